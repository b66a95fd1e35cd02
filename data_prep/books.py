"""Project Gutenberg's plain text books: licence texts off, hard-wrapped lines joined into paragraphs."""

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.text import BLANK_LINES, find_by_name, one_a_line, read_utf8

# The last line of the header: since 2002, and the "small print" of the etexts before (its own START line only
# opens the small print, its END line closes it). The title may wrap onto more lines, up to the closing stars.
HEADER_ENDS = (
    re.compile(r"^\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG[^*]*\*\*\*.*$", re.I | re.M),
    re.compile(r"^\*END\*? ?THE SMALL PRINT!.*$", re.I | re.M),
    re.compile(r"^\*+ *SMALL PRINT! FOR .*\*+$", re.I | re.M),
)
FOOTER_STARTS = (
    re.compile(r"^\*\*\* ?END OF (THE|THIS) PROJECT GUTENBERG", re.I | re.M),
    re.compile(r"^End of (the |this )?(Project Gutenberg|Etext)", re.I | re.M),
)
CREDITS = re.compile(
    r"(Produced|E-text prepared|Scanned|Transcribed|This (e-?text|e-?book) was)\b.*\bby\b"
    r"|Note: Project Gutenberg also has|\[\"Small Print\""
    r"|\W*(The )?Project Gutenberg('s)? E-?text",
    re.I | re.S,
)
# Paragraphs after the header that may hold the credits.
CREDITS_WITHIN = 3
NOT_PROSE = re.compile(
    r"\[(Illustration|Picture)\b[^\]]*\]|\[\s*Transcriber['’]s Notes?\b[^\]]*\]|<<THIS ELECTRONIC VERSION[^>]*>>", re.I
)
ITALICS = re.compile(r"(?<![^\W_])_([^_]+)_(?![^\W_])")


def find_files(root: Path) -> list[Path]:
    return find_by_name(root, re.compile(r"(?i).+\.txt"), ".txt")


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    yield "", clean_book(read_utf8(path))


def clean_book(text: str) -> str:
    """The book without Project Gutenberg's header and footer, where it has them, a line a paragraph."""
    body = BLANK_LINES.split(NOT_PROSE.sub("", without_licence(text)).strip())
    head = [paragraph for paragraph in body[:CREDITS_WITHIN] if not CREDITS.match(paragraph.strip())]
    return one_a_line(ITALICS.sub(r"\1", paragraph) for paragraph in head + body[CREDITS_WITHIN:])


def without_licence(text: str) -> str:
    # The small print names itself at its start and its end: the header ends with the last mark in the file's
    # first half, the footer begins with the first mark after that.
    ends = [match.end() for mark in HEADER_ENDS for match in mark.finditer(text, 0, len(text) // 2)]
    text = text[max(ends, default=0) :]
    starts = [match.start() for mark in FOOTER_STARTS for match in mark.finditer(text, len(text) // 2)]
    return text[: min(starts, default=len(text))]
