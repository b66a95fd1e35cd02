"""Arrays that are made once on a machine: one process writes them to a file, all map it and share its pages.

    $MSLT_CACHE (default ~/.cache/mslt) / corpus hash / NAME-key.arrays      delete at any time, they are made anew

A file is one line of JSON (its key, the arrays' names, types and shapes, CRC-32 and size of all that follows), then
the arrays, each at a multiple of 64 bytes. A file that was cut or changed is made anew. Where the folder cannot be
written or locked, the arrays stay in the memory of the process that made them.
"""

import fcntl
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mslt.files import canonical_json, sha256_text, whole_file

Arrays = dict[str, np.ndarray]

FORMAT_VERSION = 1
ALIGNMENT_BYTES = 64


def cached(corpus: str, name: str, key: dict[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """The arrays that `make` returns, read-only. `corpus`, `name` and `key` are everything that decides them.

    Of all processes on a machine that ask at the same time one makes them, the others wait for it.
    """
    path, full_key = _path(corpus, name, key), _full_key(corpus, name, key)
    made = None
    try:
        found = _read(path, full_key)
        if found is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f"{name}.lock")):
            found = _read(path, full_key)
            if found is None:
                made = make()
                _write(path, full_key, made)
                found = _read(path, full_key)
    except OSError:
        found = None
    if found is not None:
        return found
    return make() if made is None else made


def discard(corpus: str, name: str, key: dict[str, Any]) -> None:
    """Delete the file, if there is one. A process that has it mapped keeps it."""
    try:
        _path(corpus, name, key).unlink(missing_ok=True)
    except OSError:
        return  # not ours to delete: it only takes room


def cache_folder() -> Path:
    return Path(os.environ.get("MSLT_CACHE") or Path.home() / ".cache" / "mslt")


def _path(corpus: str, name: str, key: dict[str, Any]) -> Path:
    digest = sha256_text(canonical_json(_full_key(corpus, name, key)))
    return cache_folder() / corpus[:16] / f"{name}-{digest[:16]}.arrays"


def _full_key(corpus: str, name: str, key: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT_VERSION, "corpus": corpus, "name": name, **key}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
