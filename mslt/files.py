"""Files written whole: a temporary name, fsync, rename. A reader sees the old content or the new, never a half.

What a killed process left under the temporary name is overwritten by the next to write the same file.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mslt.errors import MsltError

SEEN_S = 90  # NFS keeps what it knows of a folder for up to 60 s


def wait_until_seen(is_there: Callable[[], bool]) -> None:
    """Wait for what another machine has written: network file systems look again only after a while. Returns after
    SEEN_S all the same."""
    deadline = time.monotonic() + SEEN_S
    while not is_there() and time.monotonic() < deadline:
        time.sleep(0.5)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces. What hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def fsync_folder(path: Path) -> None:
    """Make renames and new names inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def lock_alone(path: Path, busy: str | None) -> Iterator[IO[str]]:
    """Hold the lock file `path` for this process; the system lets go when it ends, however it ends. While another
    process holds it MsltError `busy`, or without that waiting; a warning where the file system has no locks. Yields the
    file, which all that hold it read alike, also over the network."""
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy is not None else 0))
        except BlockingIOError:
            raise MsltError(busy) from None
        except OSError as error:
            print(f"warning: {path.parent}: cannot be locked ({error}); start no second run in it", file=sys.stderr)
        yield file


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; at success it is synced and takes the name `path`, at failure it goes."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with full_disk_named(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """An OSError for a full disk or quota, or a file over the system's limit, says which file and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        said = f"{os.strerror(error.errno)}; make room and run the same command again"
        raise OSError(error.errno, said, str(path)) from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder. An existing folder `path` is replaced."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with full_disk_named(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
            fsync_folder(temporary)
            if path.exists():
                shutil.rmtree(path)
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(path.parent)
