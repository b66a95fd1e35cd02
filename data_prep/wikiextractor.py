"""Wikipedia as WikiExtractor writes it: files wiki_NN, or wiki_NN.bz2, of `<doc id= url= title=>` … `</doc>`, a line
a paragraph; or with `--json`, a line a page.

The first only look like XML, so they are read by line. Pages that hold no more than their title are common (half of
a real extract); they come back as "empty", to be counted.
"""

import bz2
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_prep.documents import MAX_DOCUMENT_BYTES, Document, Part
from data_prep.recipe import FileSource
from data_prep.text import one_a_line
from data_prep.wikitext import decode_entities, is_link_section, strip, tidy
from mslt.errors import MsltError

BOM = b"\xef\xbb\xbf"
WHITE_SPACE = b" \t\r\n"
BEGINNING_BYTES = 256  # enough to know a line that is too long
START = re.compile(rb'<doc id="([^"]*)"')
TAG = re.compile(r"</?[A-Za-z][^<>]*>|\b(formula|codice)_\d+\b")  # it writes formula_1 for <math>, codice_1 for <code>
WIKITEXT = re.compile(r"\[\[|\]\]|\{\{|\}\}")
# Lines of tables, image captions and templates that were cut in the middle.
REMAINS = re.compile(r"^[!|]|\b(colspan|rowspan|style|bgcolor)\s*=|\|\s*\w+\s*=|\|thumb\b")
HEADING_WORDS = 5


class Line(NamedTuple):
    """A line with its end; of one longer than MAX_DOCUMENT_BYTES, `raw` is the beginning only."""

    raw: bytes
    num_bytes: int

    @property
    def is_whole(self) -> bool:
        return len(self.raw) == self.num_bytes


def read_part(source: FileSource, part: Part) -> Iterator[Document]:
    """The file's pages in order: with their text, or dropped as "empty", "oversized" or "damaged"."""
    assert part.path is not None
    lines = read_lines(part.path)
    first = next((line for line in lines if line.raw.strip(BOM + WHITE_SPACE)), None)
    if first is not None:
        is_json = first.raw.lstrip(BOM + WHITE_SPACE).startswith(b"{")
        yield from (read_json if is_json else read_docs)(part, chain([first], lines))


def read_lines(path: Path) -> Iterator[Line]:
    """Never holds more than MAX_DOCUMENT_BYTES of a line. MsltError if a .bz2 is damaged or cut off."""
    with bz2.open(path, "rb") if path.suffix == ".bz2" else open(path, "rb") as file:
        try:
            while (line := read_line(file)).num_bytes:
                yield line
        except (EOFError, OSError) as error:
            if path.suffix != ".bz2":
                raise
            raise MsltError(f"{path}: damaged or cut off ({error}); copy or extract it again") from error


def read_line(file: BinaryIO | bz2.BZ2File) -> Line:
    raw = piece = file.readline(MAX_DOCUMENT_BYTES + 1)
    num_bytes = len(raw)
    if num_bytes > MAX_DOCUMENT_BYTES:
        raw = raw[:BEGINNING_BYTES]
    while num_bytes > MAX_DOCUMENT_BYTES and piece and not piece.endswith(b"\n"):
        piece = file.readline(MAX_DOCUMENT_BYTES)
        num_bytes += len(piece)
    return Line(raw, num_bytes)


# <doc> … </doc>


def read_docs(part: Part, lines: Iterator[Line]) -> Iterator[Document]:
    key: str | None = None
    held: list[bytes] = []
    num_bytes = 0
    for line in lines:
        start = START.match(line.raw.removeprefix(BOM))
        if key is not None and (start or line.raw.startswith(b"</doc>")):
            yield make_page(key, held, num_bytes)
            key = None
        if start:
            key, held, num_bytes = f"{part.name}#{start[1].decode(errors='replace')}", [], 0
        elif key is not None:
            num_bytes += line.num_bytes
            if num_bytes <= MAX_DOCUMENT_BYTES:
                held.append(line.raw)
            else:
                held.clear()
        elif line.raw.strip() and not line.raw.startswith(b"</doc>"):
            raise MsltError(
                f'{part.path}: text outside of a <doc id="…"> page ({line.raw.strip()[:40]!r}); '
                "read are dumps named ….xml, .xml.bz2 or .xml.gz, and the output of WikiExtractor"
            )
    if key is not None:
        yield make_page(key, held, num_bytes)


def make_page(key: str, lines: list[bytes], num_bytes: int) -> Document:
    if num_bytes > MAX_DOCUMENT_BYTES:
        return Document(key, "", num_bytes, "oversized")
    try:
        text = b"".join(lines).decode()
    except UnicodeDecodeError:
        return Document(key, "", num_bytes, "damaged")
    return make_document(key, text.partition("\n")[2], num_bytes)  # the first line is the title


def make_document(key: str, text: str, num_bytes: int) -> Document:
    if "\0" in text:
        return Document(key, "", num_bytes, "damaged")
    cleaned = one_a_line(clean_line(line) for line in text.split("\n"))
    return Document(key, cleaned, num_bytes, "" if cleaned else "empty")


def clean_line(line: str) -> str:
    """Without tags and what templates leave behind; nothing of table lines and headings."""
    line = TAG.sub("", decode_entities(line)).strip()
    if REMAINS.search(line) or is_heading(line):
        return ""
    return tidy(strip(line) if WIKITEXT.search(line) else line)


def is_heading(line: str) -> bool:
    """WikiExtractor writes the heading `== Early life ==` as the line `Early life.`: no sentence, so it goes."""
    return (len(line.split()) <= HEADING_WORDS and line.endswith(".")) or is_link_section(line)


# JSON lines


def read_json(part: Part, lines: Iterator[Line]) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.is_whole:
            yield Document(f"{part.name}#line {number}", "", line.num_bytes, "oversized")
        elif line.raw.strip():
            yield read_object(part.name, number, line.raw)


def read_object(name: str, number: int, raw: bytes) -> Document:
    """`text` of {"id": …, "title": …, "text": …}; its bytes are those of the text, as UTF-8, of a damaged line all."""
    key = f"{name}#line {number}"
    try:
        page = json.loads(raw.removeprefix(BOM))
        text = page["text"]
        num_bytes = len(text.encode())  # fails for half a surrogate pair
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Document(key, "", len(raw), "damaged")
    if page.get("id") is not None:
        key = f"{name}#{page['id']}"
    title = page.get("title")
    if isinstance(title, str):
        text = text.removeprefix(f"{title}\n")
    return make_document(key, text, num_bytes)
