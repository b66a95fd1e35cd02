"""Wikipedia as WikiExtractor writes it: files wiki_NN, or wiki_NN.bz2, of `<doc id= url= title=>` … `</doc>`, a line
a paragraph; or with `--json`, a line a page.

The first only look like XML, so they are read by line. Pages that hold no more than their title are common (half of
a real extract); they come back as "empty", to be counted.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from data_prep.documents import Document, Part
from data_prep.recipe import FileSource
from data_prep.rows import parse_json
from data_prep.text import LINE_END, Span, decode, make_document, one_a_line, open_file, read_lines
from data_prep.wikitext import decode_entities, is_link_section, strip, tidy
from mslt.errors import MsltError

BOM = b"\xef\xbb\xbf"
START = b'<doc id="'
END = b"</doc>"
TAG = re.compile(r"</?[A-Za-z][^<>]*>|\b(formula|codice)_\d+\b")  # it writes formula_1 for <math>, codice_1 for <code>
WIKITEXT = re.compile(r"\[\[|\]\]|\{\{|\}\}")
# Lines of tables, image captions and templates that were cut in the middle.
REMAINS = re.compile(r"^[!|]|\b(colspan|rowspan|style|bgcolor)\s*=|\|\s*\w+\s*=|\|thumb\b")
HEADING_WORDS = 5


def read_part(source: FileSource, part: Part) -> Iterator[Document]:
    """The file's pages in order: with their text, or dropped as "empty", "oversized" or "damaged"."""
    assert part.path is not None
    with open_file(part.path) as file:
        lines = read_lines(file, 0)
        first = next((line for line in lines if line.raw is None or line.raw.removeprefix(BOM).strip()), None)
        if first is None:
            yield Document("", 0, "empty")
        elif first.raw is None or first.raw.removeprefix(BOM).lstrip().startswith(b"{"):
            yield from map(read_json, chain([first], lines))
        else:
            yield from read_docs(part.path, chain([first], lines))


def read_docs(path: Path, lines: Iterable[Span]) -> Iterator[Document]:
    """The pages of `<doc>` … `</doc>`. One without its end, for the next begins or the file ends, is damaged."""
    page: Span | None = None
    for line in lines:
        raw = (line.raw or b"").removeprefix(BOM)
        starts, ends = raw.startswith(START), raw.startswith(END)
        if page and (starts or ends):
            text = decode(page.raw) if ends and page.raw is not None else None
            # The first line is the title.
            yield make_page(text and text.partition("\n")[2], page.num_bytes)
            page = None
        if starts:
            page = Span(line.start)
        elif page:
            page.add(line.raw, line.num_bytes)
        elif not ends and not line.is_blank:
            raise MsltError(
                f'{path}: text outside of a <doc id="…"> page ({bytes(raw.strip()[:40])!r}); '
                "read are dumps named ….xml, .xml.bz2 or .xml.gz, and the output of WikiExtractor"
            )
    if page:
        yield make_page(None, page.num_bytes)


def read_json(line: Span) -> Document:
    """The page in a line {"id": …, "title": …, "text": …}; a blank line is empty, any other damaged."""
    text = None if line.raw is None else decode(line.raw)
    if text and text.strip():
        row = parse_json(text)
        text = row.get("text") if isinstance(row, dict) else None
        text = text.removeprefix(f"{row.get('title')}\n") if isinstance(text, str) else None
    return make_page(text, line.num_bytes)


def make_page(text: str | None, num_bytes: int) -> Document:
    page = make_document(text, num_bytes, LINE_END)
    if page.dropped:
        return page
    cleaned = one_a_line(map(clean_line, page.text.split("\n")))
    return Document(cleaned, num_bytes, "" if cleaned else "empty")


def clean_line(line: str) -> str:
    """Without tags and what templates leave behind; nothing of table lines and headings."""
    line = TAG.sub("", decode_entities(line)).strip()
    if REMAINS.search(line) or is_heading(line):
        return ""
    return tidy(strip(line) if WIKITEXT.search(line) else line)


def is_heading(line: str) -> bool:
    """WikiExtractor writes the heading `== Early life ==` as the line `Early life.`: no sentence, so it goes."""
    return (len(line.split()) <= HEADING_WORDS and line.endswith(".")) or is_link_section(line)
