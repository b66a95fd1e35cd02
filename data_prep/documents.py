"""What every reader gives: the parts of a source, and the documents of a part.

A reader is a module with two functions. `list_parts(source)` lists what the source holds in parts that can be read side
by side, in a fixed order; `read_part(source, part)` streams the documents of one part, in order, whoever reads it.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from mslt.errors import MsltError

# A document larger than this is damage or no document (War and Peace has 3.2 MB), and is dropped as "oversized".
MAX_DOCUMENT_BYTES = 16 * 2**20
# Files that can be read from the middle are cut into parts of about this size.
PART_BYTES = 16 * 2**20
# Of the files passed over, as many are named.
NAMED_FILES = 3


class Part(NamedTuple):
    """`name`: the file's, relative to its source, so that moving the source changes nothing. `start` and `end` say
    which share of it, in the reader's own unit; `size_bytes` is for the progress bar."""

    name: str
    path: Path | None
    start: int
    end: int
    size_bytes: int


class Document(NamedTuple):
    """`text` is its paragraphs, one a line. `num_bytes` counts it as found, before any cleaning, so that what was read
    is what was kept and what was dropped. `dropped` is the rule that took it already in reading; its text is empty."""

    text: str
    num_bytes: int
    dropped: str = ""


def find_files(root: Path, pattern: re.Pattern[str], meaning: str) -> list[Path]:
    """Files under `root` whose whole name fits, sorted by their relative path; hidden ones are left out, and others
    are named on stderr. `root` may itself be a file. MsltError, with `meaning` for the names read, if there is none."""
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise MsltError(f"{root}: no such file or folder; correct the source's path")
    files: list[Path] = []
    others: list[Path] = []
    for path in walk_files(root):
        (files if pattern.fullmatch(path.name) and path.is_file() else others).append(path)
    if not files:
        raise MsltError(f"{root}: no file to read in this folder or below; read are {meaning}")
    if others:
        names = [path.relative_to(root).as_posix() for path in others[:NAMED_FILES]]
        names += ["…"] if len(others) > NAMED_FILES else []
        print(f"{root}: {len(others)} files passed over ({', '.join(names)}); read are {meaning}", file=sys.stderr)
    return files


def walk_files(root: Path) -> list[Path]:
    """All that is under `root` and no folder, links followed, sorted by relative path; hidden files and folders are
    left out. A folder that is reached by more than one way, as by a link to a folder above, is walked once. MsltError
    if one cannot be read."""

    def fail(error: OSError) -> NoReturn:
        raise MsltError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or take it out")

    seen = {os.path.realpath(root)}
    files = []
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        files += [Path(folder, name) for name in names if not name.startswith(".")]
        new = []
        for name in sorted(subfolders):
            real = os.path.realpath(os.path.join(folder, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                new.append(name)
        subfolders[:] = new
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def list_files(root: Path, files: list[Path], cut: Callable[[Path], list[tuple[int, int]]] | None = None) -> list[Part]:
    """A part for each file, or for each (start, end) in bytes that `cut` finds in it."""
    parts = []
    for path in files:
        name = path.name if path == root else path.relative_to(root).as_posix()
        for start, end in cut(path) if cut else [(0, path.stat().st_size)]:
            parts.append(Part(name, path, start, end, end - start))
    return parts
