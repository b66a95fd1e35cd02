"""What every reader gives: the parts of a source, and the documents of a part.

A reader is a module with two functions. `list_parts(source)` lists what the source holds in parts that can be read side
by side, in a fixed order; `read_part(source, part)` streams the documents of one part, in order, whoever reads it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mslt.errors import MsltError

# A document larger than this is damage or no document (War and Peace has 3.2 MB), and is dropped as "oversized".
MAX_DOCUMENT_BYTES = 16 * 2**20
# Files that can be read from the middle are cut into parts of about this size.
PART_BYTES = 16 * 2**20


class Part(NamedTuple):
    """`name`: the file's, relative to its source, so that moving the source changes nothing. `start` and `end` say
    which share of it, in the reader's own unit; `size_bytes` is for the progress bar."""

    name: str
    path: Path | None
    start: int
    end: int
    size_bytes: int


class Document(NamedTuple):
    """`key` names the document: the part's name, and `#` with the page's or chapter's where the file holds more.
    `text` is its paragraphs, one a line. `num_bytes` counts it as found, before any cleaning, so that what was read is
    what was kept and what was dropped. `dropped` is the rule that took it already in reading; its text is empty."""

    key: str
    text: str
    num_bytes: int
    dropped: str = ""


def find_files(root: Path, pattern: re.Pattern[str], meaning: str) -> list[Path]:
    """Files under `root` whose whole name fits, sorted by their relative path; hidden ones are left out. `root` may
    itself be a file. MsltError, with `meaning` for the names read, if there is none."""
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise MsltError(f"{root}: no such file or folder; correct the source's path")
    files = [
        path
        for path in root.rglob("*")
        if pattern.fullmatch(path.name)
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    ]
    if not files:
        raise MsltError(f"{root}: no file to read in this folder or below; read are {meaning}")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def list_files(root: Path, files: list[Path], cut: Callable[[Path], list[tuple[int, int]]] | None = None) -> list[Part]:
    """A part for each file, or for each (start, end) in bytes that `cut` finds in it."""
    parts = []
    for path in files:
        name = path.name if path == root else path.relative_to(root).as_posix()
        for start, end in cut(path) if cut else [(0, path.stat().st_size)]:
            parts.append(Part(name, path, start, end, end - start))
    return parts
