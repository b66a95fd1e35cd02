"""Arrays that are made once on a machine: one process writes them to a file, all map it and share its pages.

    $MSLT_CACHE (default mslt-UID in the temporary folder) / corpus hash / NAME-key.arrays  NAME-key.lock

The folder is to be on a disk of this machine. There a file may be deleted at any time: whoever has it mapped keeps it,
the next makes it anew. On a network's disk a file that another machine replaces or deletes is gone from under those
that have it mapped, and ends them (ESTALE, SIGBUS). Files not opened for a week go when another is written.

A file is one line of JSON (its key, the arrays' names, types and shapes, CRC-32 and size of all that follows), then
the arrays, each at a multiple of 64 bytes. A file that was cut or changed is made anew. Where no file can be kept, a
warning says why, and the arrays stay in the memory of the process that made them.
"""

import fcntl
import functools
import json
import mmap
import os
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from mslt.files import canonical_json, sha256_text, whole_file

Arrays = dict[str, np.ndarray]

FORMAT_VERSION = 1
ALIGNMENT_BYTES = 64
UNUSED_S = 7 * 24 * 3600
OUR_FILES = "[0-9a-f]" * 16 + "/*-" + "[0-9a-f]" * 16 + ".*"  # matches nothing else in a folder that is not ours alone


def cached(
    corpus: str,
    name: str,
    key: dict[str, Any],
    make: Callable[[], Arrays],
    is_enough: Callable[[Arrays], bool] = lambda _: True,
) -> Arrays:
    """The arrays that `make` returns, read-only. `corpus`, `name` and `key` are everything that decides them.

    Of all processes on a machine that ask at the same time one makes them, the others wait for it. Arrays that grow
    are made anew, and their file replaced, where what was found is not enough.
    """
    folder, full_key = cache_folder(), {"format": FORMAT_VERSION, "corpus": corpus, "name": name, **key}
    path = folder / corpus[:16] / f"{name}-{sha256_text(canonical_json(full_key))[:16]}.arrays"

    def found() -> Arrays | None:
        arrays = _read(path, full_key)
        return arrays if arrays is not None and is_enough(arrays) else None

    arrays: Arrays | None = None
    turn: IO[str] | None = None
    with _told(folder):
        _make_folder(folder, path.parent)
        unfit = _inode(path)
        arrays = found()
        if arrays is None:
            turn = _turn(path, unfit)
        if arrays is None and turn is None:
            arrays = found()
    if arrays is not None:
        return arrays
    if turn is None:
        return make()  # here or in the process that we waited for it could not be written: at least not one by one
    with turn:  # until it is closed
        made = make()
        with _told(folder):
            _write(path, full_key, made)
    with _told(folder):
        _delete_unused(folder)
        arrays = found()
    return made if arrays is None else arrays


def cache_folder() -> Path:
    return Path(os.environ.get("MSLT_CACHE") or Path(tempfile.gettempdir()) / f"mslt-{os.getuid()}")


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Trouble with the files costs the files only; it is told once."""
    try:
        yield
    except OSError as error:
        _tell(folder, os.strerror(error.errno) if error.errno else str(error))


@functools.cache
def _tell(folder: Path, reason: str) -> None:
    print(
        f"warning: the sample index cannot be kept in {folder} ({reason}): every process holds its own; "
        "set MSLT_CACHE to a folder of this machine",
        file=sys.stderr,
    )


def _make_folder(folder: Path, inside: Path) -> None:
    """OSError if the default folder, whose name anyone may take, is not this user's alone to write."""
    if not os.environ.get("MSLT_CACHE"):
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise OSError("not a folder that this user alone may write")
    inside.mkdir(parents=True, exist_ok=True)


def _turn(path: Path, unfit: int | None) -> IO[str] | None:
    """A lock to make the file under. None where another process has done so meanwhile, or tried to: `unfit` is the
    inode of the file that was looked at before."""
    with ExitStack() as opened:
        lock = opened.enter_context(open(path.with_suffix(".lock"), "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_SH)  # with all others that waited
            return None
        if _inode(path) != unfit:
            return None
        opened.pop_all()
        return lock


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _delete_unused(folder: Path) -> None:
    for path in folder.glob(OUR_FILES):
        with suppress(OSError):  # another process deleted it, or it is another user's
            if path.stat().st_mtime < time.time() - UNUSED_S:
                path.unlink()


def _write(path: Path, key: dict[str, Any], arrays: Arrays) -> None:
    parts = [_padded(np.ascontiguousarray(array).view(np.uint8).data) for array in arrays.values()]
    checksum = 0
    for part in (piece for pieces in parts for piece in pieces):
        checksum = zlib.crc32(part, checksum)
    header = {
        "key": key,
        "arrays": {name: [array.dtype.str, array.shape] for name, array in arrays.items()},
        "crc32": checksum,
        "bytes": sum(len(piece) for pieces in parts for piece in pieces),
    }
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 1) % ALIGNMENT_BYTES) + b"\n"
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(line)
        for part in (piece for pieces in parts for piece in pieces):
            file.write(part)


def _padded(data: memoryview) -> tuple[memoryview | bytes, bytes]:
    return data, b"\0" * (-len(data) % ALIGNMENT_BYTES)


def _read(path: Path, key: dict[str, Any]) -> Arrays | None:
    """Map the file; None if there is none, or if it is of another key or damaged."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline())
            at = file.tell()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with suppress(OSError):  # another user's, or read-only: theirs to keep
                os.utime(file.fileno())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(header, dict) or header.get("key") != key:
        return None
    body = memoryview(mapped)[at:]
    if len(body) != header["bytes"] or zlib.crc32(body) != header["crc32"]:
        return None
    arrays = {}
    for name, (dtype, shape) in header["arrays"].items():
        array = np.frombuffer(mapped, dtype, int(np.prod(shape)), at).reshape(shape)
        arrays[name] = array
        at += array.nbytes + -array.nbytes % ALIGNMENT_BYTES
    return arrays
