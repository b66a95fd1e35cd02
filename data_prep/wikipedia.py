"""Wikipedia as WikiExtractor writes it: files wiki_NN of `<doc id= url= title=>` … `</doc>`, a line a paragraph.

The files only look like XML, so they are read by line. Pages that hold no more than their title are common
(half of a real extract); they come back with empty text, to be counted.
"""

import html
import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.text import decode, find_by_name, one_a_line
from mslt.errors import MsltError

START = re.compile(r'<doc id="([^"]*)"')
TAG = re.compile(r"</?[A-Za-z][^<>]*>")
TABLE_LINE = re.compile(r"^[!|]|\b(colspan|rowspan|style|bgcolor)\s*=")
# What is left of `(Chinese: {{lang|zh|…}})` once the templates are gone.
EMPTY_BRACKETS = re.compile(r"\s*\(\s*[,;:]*\s*\)")
HEADING_WORDS = 5


def find_files(root: Path) -> list[Path]:
    return find_by_name(root, re.compile(r"wiki_\d+"), "WikiExtractor's wiki_00, wiki_01, …")


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """(page id, text) of every page, in file order; MsltError if there is text outside of pages."""
    page_id: str | None = None
    lines: list[str] = []
    with open(path, "rb") as file:
        for raw in file:
            line = decode(raw, path)
            start = START.match(line)
            if page_id is not None and (start or line.startswith("</doc>")):
                yield page_id, clean_page(lines)
                page_id = None
            if start:
                page_id, lines = start[1], []
            elif page_id is not None:
                lines.append(line)
            elif line.strip() and not line.startswith("</doc>"):
                raise MsltError(
                    f'{path}: text outside of a <doc id="…"> page ({line.strip()[:40]!r}); '
                    "this kind reads the output of WikiExtractor: run it over the dump first"
                )
    if page_id is not None:
        yield page_id, clean_page(lines)


def clean_page(lines: list[str]) -> str:
    """Drop the title, which is the first line, the headings, and what tables, tags and templates leave behind."""
    return one_a_line(clean_line(line) for line in lines[1:])


def clean_line(line: str) -> str:
    line = TAG.sub("", html.unescape(line)).strip()
    if TABLE_LINE.search(line) or is_heading(line):
        return ""
    return EMPTY_BRACKETS.sub("", line)


def is_heading(line: str) -> bool:
    """WikiExtractor writes the heading `== Early life ==` as the line `Early life.`: no sentence, so it goes."""
    return len(line.split()) <= HEADING_WORDS and line.endswith(".")
