"""Plain text files: one document a file, several where it is long, paragraphs separated by blank lines.

In all of data_prep a document's text is its paragraphs, one a line: `paragraphs` makes it so.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mslt.errors import MsltError

LONG_CHARACTERS = 10_000  # some four pages of a book
BLANK_LINES = re.compile(r"\n\s*\n")


def find_files(root: Path) -> list[Path]:
    """All text files under a folder, or the one file given; hidden files and folders are left out."""
    return find_by_name(root, re.compile(r"(?i).+\.(txt|md|rst)"), ".txt, .md, .rst")


def find_by_name(root: Path, pattern: re.Pattern[str], meaning: str) -> list[Path]:
    """Files under `root` whose whole name fits, sorted by their relative path. `root` may itself be a file.
    MsltError, with `meaning` for the names read, if there is none."""
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


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """The file as one document, or a long one as several, `part 1` and on, cut between paragraphs: held-out text and
    random sentence pairs need documents to choose from, also where all text is in a few files."""
    parts = list(cut(paragraphs(read_utf8(path)).split("\n"), LONG_CHARACTERS))
    for number, part in enumerate(parts, 1):
        yield f"part {number}" if len(parts) > 1 else "", part


def cut(lines: list[str], characters: int) -> Iterator[str]:
    """Paragraphs in order, put together until they reach `characters`."""
    held: list[str] = []
    for line in lines:
        held.append(line)
        if sum(map(len, held)) >= characters:
            yield "\n".join(held)
            held = []
    if held:
        yield "\n".join(held)


def read_utf8(path: Path) -> str:
    """The file's text with \\n as line end and no byte order mark; MsltError if it is not UTF-8 text."""
    text = decode(path.read_bytes(), path)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode(raw: bytes, path: Path) -> str:
    remedy = "convert it to UTF-8 text, or take it out of the source"
    if b"\0" in raw:
        raise MsltError(f"{path}: a binary file (it holds a NUL byte); {remedy}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MsltError(f"{path}: not UTF-8 (byte {error.start}: {raw[error.start]:#04x}); {remedy}") from error


def paragraphs(text: str) -> str:
    """Join hard-wrapped lines: a blank line separates paragraphs, which come back one a line."""
    return one_a_line(BLANK_LINES.split(text))


def one_a_line(pieces: Iterable[str]) -> str:
    """Collapse the white space of each piece and leave out the empty ones."""
    joined = (" ".join(piece.split()) for piece in pieces)
    return "\n".join(piece for piece in joined if piece)
