"""Plain text files, long ones cut into documents between paragraphs; and what all readers of files share.

In all of data_prep a document's text is its paragraphs, one a line: `one_a_line` makes it so.
"""

import bz2
import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_prep.documents import MAX_DOCUMENT_BYTES, PART_BYTES, Document, Part, find_files, list_files
from data_prep.recipe import FileSource
from mslt.errors import MsltError

# Some three pages of a book. PART_BYTES is a multiple of it, so that where parts are cut decides no document.
LONG_BYTES = 2**13
CHUNK_BYTES = 2**16
BLANK_LINES = re.compile(r"\n\s*\n")
LINE_END = re.compile("\n")
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}
NO_TEXT = re.compile("[\0\ud800-\udfff]")


def list_parts(source: FileSource) -> list[Part]:
    root = Path(source.path or ".").expanduser()
    files = find_files(root, re.compile(r"(?i).+\.(txt|md|rst)"), ".txt, .md, .rst")
    return list_files(root, files[: source.max_files], cut_file)


def read_part(source: FileSource, part: Part) -> Iterator[Document]:
    """A file of LONG_BYTES or less is one document. Of a longer one, the third document is the paragraphs that start in
    its third LONG_BYTES: held-out text and random sentence pairs need documents to choose from, also where all text is
    in a few files. A document that is not UTF-8, or holds a NUL, is damaged."""
    assert part.path is not None
    with open_file(part.path) as file:
        for span in read_spans(file, part.start, part.end):
            text = None if span.raw is None else decode(span.raw)
            yield make_document(text, span.num_bytes, BLANK_LINES)


@dataclass(slots=True)
class Span:
    """Bytes of a file from `start` on: a line, a paragraph, a document. `raw` is None, and no memory held, where there
    are more than MAX_DOCUMENT_BYTES."""

    start: int
    raw: bytearray | None = field(default_factory=bytearray)
    num_bytes: int = 0
    is_blank: bool = True

    def add(self, raw: bytes | bytearray | None, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.is_blank = self.is_blank and raw is not None and not raw.strip()
        if self.raw is None or raw is None or self.num_bytes > MAX_DOCUMENT_BYTES:
            self.raw = None
        else:
            self.raw += raw


def read_spans(file: BinaryIO, start: int, end: int) -> Iterator[Span]:
    """The paragraphs that start in [start, end), together where they start in the same LONG_BYTES of the file."""
    span = None
    for paragraph in read_paragraphs(file, start, end):
        if span and paragraph.start // LONG_BYTES == span.start // LONG_BYTES:
            span.add(paragraph.raw, paragraph.num_bytes)
        else:
            if span:
                yield span
            span = paragraph
    if span:
        yield span


def read_paragraphs(file: BinaryIO, start: int, end: int) -> Iterator[Span]:
    """The paragraphs that start in [start, end), each with the blank lines after it; blank lines that open the file
    are one of their own."""
    first = find_line(file, start, end)
    if first >= end > 0:
        return
    after_blank = follows_blank_line(file, first)
    paragraph = Span(0) if start == 0 else None
    for line in read_lines(file, first):
        starts = after_blank and not line.is_blank
        after_blank = line.is_blank
        if starts and paragraph and paragraph.num_bytes:
            yield paragraph
            paragraph = None
        if paragraph is None and line.start >= end:
            return
        if paragraph is None and starts:
            paragraph = Span(line.start)
        if paragraph:
            paragraph.add(line.raw, line.num_bytes)
    if paragraph:
        yield paragraph


def follows_blank_line(file: BinaryIO, offset: int) -> bool:
    """Whether the line before the one at `offset` is blank; the start of the file counts as a blank line."""
    end = offset - 1
    while end > 0:
        start = max(0, end - CHUNK_BYTES)
        file.seek(start)
        kept = file.read(end - start).rstrip(b" \t\r\f\v")
        if kept:
            return kept.endswith(b"\n")
        end = start
    return True


def find_line(file: BinaryIO, start: int, end: int) -> int:
    """Where the first line at or after `start` begins; `end` or more if none begins before it."""
    if start == 0:
        return 0
    file.seek(start - 1)
    while file.tell() < end and (chunk := file.readline(CHUNK_BYTES)) and not chunk.endswith(b"\n"):
        pass
    return file.tell()


def read_lines(file: BinaryIO, offset: int, end: int | None = None) -> Iterator[Span]:
    """The lines that start in [offset, end), or to the end of the file, with their line ends. `offset` starts one."""
    file.seek(offset)
    while end is None or offset < end:
        chunk = file.readline(CHUNK_BYTES)
        if not chunk:
            return
        line = Span(offset)
        line.add(chunk, len(chunk))
        while len(chunk) == CHUNK_BYTES and not chunk.endswith(b"\n"):
            chunk = file.readline(CHUNK_BYTES)
            line.add(chunk, len(chunk))
        yield line
        offset += line.num_bytes


def cut_file(path: Path) -> list[tuple[int, int]]:
    """Shares of PART_BYTES; an empty file is one share, so that it is counted."""
    size = path.stat().st_size
    return [(start, min(start + PART_BYTES, size)) for start in range(0, max(size, 1), PART_BYTES)]


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open to read, unpacked where the name ends in .gz or .bz2; MsltError if it cannot be read or unpacked."""
    unpack = PACKED.get(path.suffix.lower(), open)
    try:
        with unpack(path, "rb") as file:
            yield cast(BinaryIO, file)
    except (EOFError, zlib.error, OSError) as error:
        if not isinstance(error, OSError) or error.errno is None:  # gzip and bz2 say so of damage
            raise MsltError(
                f"{path}: damaged or cut short ({error}); fetch it again, or take it out of the source"
            ) from None
        raise MsltError(f"{path}: cannot be read ({error.strerror or error}); mend it, or take it out") from error


def is_packed(path: Path) -> bool:
    return path.suffix.lower() in PACKED


def decode(raw: bytes | bytearray) -> str | None:
    """The text with \\n as line end and no byte order mark; None if it is not UTF-8."""
    try:
        text = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def make_document(text: str | None, num_bytes: int, between: re.Pattern[str]) -> Document:
    """The document, its paragraphs parted at `between`; dropped if it is oversized, if its text is None or holds a NUL
    or half a surrogate pair (damaged), or if no text is left (empty)."""
    if num_bytes > MAX_DOCUMENT_BYTES:
        return Document("", num_bytes, "oversized")
    if text is None or NO_TEXT.search(text):
        return Document("", num_bytes, "damaged")
    joined = one_a_line(between.split(text))
    return Document(joined, num_bytes, "" if joined else "empty")


def one_a_line(paragraphs: Iterable[str]) -> str:
    """Collapse the white space of each paragraph and leave out the empty ones."""
    joined = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return "\n".join(paragraph for paragraph in joined if paragraph)
