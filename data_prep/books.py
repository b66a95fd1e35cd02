"""Books in plain text, as Project Gutenberg's: licence texts off, hard-wrapped lines joined, a document a chapter.

Headings cut a book, and are left out of the text: a heading is no sentence. Stanzas come back as one paragraph each,
for a verse is no sentence either.
"""

import io
import math
import re
from collections.abc import Iterator
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

from data_prep.documents import Document, Part, find_files, list_files
from data_prep.recipe import FileSource
from data_prep.text import BLANK_LINES, LINE_END, make_document, one_a_line, open_file

# More than any book (the whole Bible has 4.4 MB): a larger file is not read into memory.
MAX_BOOK_BYTES = 64 * 2**20
CHUNK_BYTES = 2**20

# Of a file that is not UTF-8: what its header says, where it says it; or how many bytes above ASCII and which below.
DECLARED_ENCODING = re.compile(rb"Character set encoding: *([\w-]+)", re.I)
WESTERN = re.compile(rb"(?:ISO|windows|cp|latin)[\w-]*|Latin1|ASCII|US-ASCII", re.I)
HEADER_BYTES = 2**13
HIGH_BYTES = bytes(range(0x80, 0x100))
CONTROL_BYTES = bytes(set(range(0x20)) - set(b"\t\n\v\f\r\x1a\x1b"))
MAX_HIGH_SHARE = 0.2
UTF8_CHARACTER = re.compile(rb"[\xc3-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}")

# The last line of the header: since 2002, and the "small print" of the etexts before (its own START line only
# opens the small print, its END line closes it). The title may wrap onto more lines, up to the closing stars.
HEADER_ENDS = (
    re.compile(r"^\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG[^*]*\*\*\*.*$", re.I | re.M),
    re.compile(r"^\*END\*? ?THE SMALL PRINT!.*$", re.I | re.M),
    re.compile(r"^\*+ *SMALL PRINT! FOR .*\*$", re.I | re.M),
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
# Characters in brackets that may be a note. Without an end to it, text that opens brackets again and again and closes
# none takes time by the square of its length: 0.8 MB more than 15 s.
MAX_NOTE = 2000
NOT_PROSE = re.compile(
    rf"\[(Illustration|Picture)\b[^\]]{{0,{MAX_NOTE}}}\]|\[\s*Transcriber['’]s Notes?\b[^\]]{{0,{MAX_NOTE}}}\]"
    rf"|<<THIS ELECTRONIC VERSION[^>]{{0,{MAX_NOTE}}}>>"
    r"|\[(Pg|Page|p\.)? ?\d+\]|\[page [ivxlc]+\.?\]|\{(Pg |Page |p\. ?)?\d+\}",
    re.I,
)
ITALICS = re.compile(r"(?<![^\W_])_([^_]+)_(?![^\W_])")

ORDINALS = "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|last"
UNITS = "one|two|three|four|five|six|seven|eight|nine"
TEENS = "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|twentieth|thirtieth|fortieth|fiftieth"
NUMBER = (
    rf"(?:\d{{1,3}}|[ivxlc]+|[a-h]|(?:the )?(?:{ORDINALS})|(?:{TEENS})(?:th)?"
    rf"|(?:{TENS})(?:[- ](?:{UNITS}|{ORDINALS}))?|{UNITS})"
)
NUMBERED = re.compile(
    r"(?:the )?(?:chapter|chap\.|book|part|act|scene|stave|letter|canto|volume|vol\.|lecture|essay|story|tale|fable"
    rf"|epistle|section|appendix|adventure|night) +{NUMBER}\b",
    re.I,
)
TITLE_AFTER_NUMBER = re.compile(r"[.:,;)\]~—–-]|  | +[~—–(-]| [\"“‘'_]?[A-Z]")
SECTION = re.compile(
    r"(?:(?:the|an?|introductory|(?:author|editor|translator|publisher|transcriber)['’]?s) )*"
    r"(?:preface|introduction|prologue|epilogue|conclusion|foreword|afterword|postscript|appendix|addendum|index"
    r"|notes?|footnotes|dedication|glossary|bibliography|(?:table of )?contents|(?:list of )?illustrations)\W*",
    re.I,
)
NUMERAL = re.compile(r"(\d{1,3}|[IVXLC]+)(?:[.:]?|[.:—–-]+ *(\S.*))")
CONTENTS = re.compile(r"\W*(?:table of )?contents\b\W*(?:page)?|list of (?:chapters|stories)\W*", re.I)
FULL_LINE_CHARACTERS = 50
ENTRY_NUMBER = re.compile(r"^\W*(?:(?i:chapter|chap\.) +)?(?:[IVXLC]+|\d+)[.:]? +")
PAGE_AT_END = re.compile(r"(?:\s{2,}|[ .]{3,}|, *)(?:[ivxlc]+|\d+(?:[-–, ]+\d+)*)\.?$")
ROMAN = re.compile(r"C{0,3}(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})")
ROMAN_VALUES = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}
# Numerals may skip a few, as where one is misspelt.
NUMERALS_SKIPPED = 3
PAGE_CHARACTERS = 200
PAGE_ENDS = "0123456789ivxlc."
WIDE_GAP_PAGE = re.compile(r"\S(?: {3,}|[ .]{4,})(?:[ivxlc]+|\d+)\.?$")
OPENS_TITLE = "\"“‘'_(["
TITLE_LINES = 4
TITLE_CHARACTERS = 200
# Text under a heading that makes a chapter: less, as in a table of contents, stays with the chapter before.
MIN_CHAPTER_CHARACTERS = 1000
LONG_CHAPTER_CHARACTERS = 100_000


def list_parts(source: FileSource) -> list[Part]:
    root = Path(source.path or ".").expanduser()
    files = find_files(root, re.compile(r"(?i).+\.(txt|gz)"), ".txt, .txt.gz, .gz")
    return list_files(root, files[: source.max_files])


def read_part(source: FileSource, part: Part) -> Iterator[Document]:
    """The pieces of a book, in order: their bytes are the file's, once unpacked. Header and footer are dropped as
    "licence"; what comes before the first chapter is a document too; a book in which none is found is one document."""
    assert part.path is not None
    raw, num_bytes = read_book(part.path)
    decoded = decode_book(raw)
    if not raw or decoded is None:
        yield make_dropped(num_bytes)
        return
    text, encoding = decoded
    lines = list(io.StringIO(text, newline=""))
    for piece in cut_book(lines):
        num_bytes = len("".join(lines[piece.start : piece.end]).encode(encoding))
        if piece.text is None:
            yield Document("", num_bytes, "licence")
        else:
            yield make_document(piece.text, num_bytes, LINE_END)


def make_dropped(num_bytes: int) -> Document:
    rule = "oversized" if num_bytes > MAX_BOOK_BYTES else "damaged" if num_bytes else "empty"
    return Document("", num_bytes, rule)


def read_book(path: Path) -> tuple[bytes, int]:
    """The file's bytes and how many they are; of more than MAX_BOOK_BYTES none are kept."""
    with open_file(path) as file:
        raw = file.read(MAX_BOOK_BYTES + 1)
        num_bytes = len(raw)
        while chunk := file.read(CHUNK_BYTES):
            num_bytes += len(chunk)
    return (raw, num_bytes) if num_bytes <= MAX_BOOK_BYTES else (b"", num_bytes)


def decode_book(raw: bytes) -> tuple[str, str] | None:
    """The text and its encoding: UTF-8, or else Windows-1252, of which ISO-8859-1 is the printable part; None where
    the bytes are neither."""
    if b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    try:
        return (raw.decode("cp1252"), "cp1252") if looks_western(raw) else None
    except UnicodeDecodeError:
        return None


def looks_western(raw: bytes) -> bool:
    """The header says so, or it says nothing, most bytes are ASCII text, and no others are characters of UTF-8."""
    declared = DECLARED_ENCODING.search(raw[:HEADER_BYTES])
    if declared:
        return WESTERN.fullmatch(declared[1]) is not None
    high = len(raw) - len(raw.translate(None, HIGH_BYTES))
    control = len(raw) - len(raw.translate(None, CONTROL_BYTES))
    return high <= MAX_HIGH_SHARE * len(raw) and not control and not UTF8_CHARACTER.search(raw)


class Block(NamedTuple):
    """Lines between blank lines: the first one's number, how many blank lines come before it, and the lines."""

    first: int
    gap: int
    lines: list[str]


class Piece(NamedTuple):
    """Lines [start, end) of a book, and their text, a paragraph a line; None of the licence."""

    start: int
    end: int
    text: str | None


def cut_book(lines: list[str]) -> Iterator[Piece]:
    """The pieces of a book, in order; each line is in one of them."""
    lines = [line.rstrip("\r\n") for line in lines]
    start, end = body_lines(lines)
    blocks = find_blocks(lines, start, end)
    headings, chapters = find_chapters(blocks)
    if start:
        yield Piece(0, start, None)
    starts = chapters if chapters[:1] == [0] else [0, *chapters]
    for first, last in pairwise([*starts, len(blocks)]):
        first_line = blocks[first].first if first else start
        last_line = blocks[last].first if last < len(blocks) else end
        inside = ["\n".join(blocks[index].lines[headings.get(index, 0) :]) for index in range(first, last)]
        if first_line < last_line:
            yield Piece(first_line, last_line, clean_text(inside, first == 0))
    if end < len(lines):
        yield Piece(end, len(lines), None)


def body_lines(lines: list[str]) -> tuple[int, int]:
    """Which lines are the book: the small print names itself at its start and its end, so the header ends with the
    last mark in the file's first half, and the footer begins with the first mark after that."""
    text = "\n".join(lines)
    half = len(text) // 2
    ends = [match.end() for mark in HEADER_ENDS for match in mark.finditer(text, 0, half)]
    start = text.count("\n", 0, max(ends)) + 1 if ends else 0
    starts = [match.start() for mark in FOOTER_STARTS for match in mark.finditer(text, half)]
    return start, max(start, text.count("\n", 0, min(starts))) if starts else len(lines)


def find_blocks(lines: list[str], start: int, end: int) -> list[Block]:
    blocks: list[Block] = []
    gap = 1
    for number in range(start, end):
        line = lines[number].replace("\ufeff", "").strip()
        if not line:
            gap += 1
        elif gap:
            blocks.append(Block(number, gap, [line]))
            gap = 0
        else:
            blocks[-1].lines.append(line)
    return blocks


def find_chapters(blocks: list[Block]) -> tuple[dict[int, int], list[int]]:
    """The blocks that open with a heading, with its number of lines; and those of them that start a chapter. Titles in
    capitals cut the books, or the parts of books, that no other heading cuts."""
    headings = find_headings(blocks)
    chapters = full_headings(blocks, headings)
    uncut = (sum(map(text_size, blocks[a:b])) for a, b in pairwise([0, *chapters, len(blocks)]))
    if len(chapters) < 2 or max(uncut) > LONG_CHAPTER_CHARACTERS:
        titles = {i: len(block.lines) for i, block in enumerate(blocks) if block.gap > 1 and is_capital_title(block)}
        headings = titles | headings
        chapters = full_headings(blocks, headings)
    if len(chapters) < 2:
        return {}, []
    headings |= title_lines(blocks, headings)
    return headings, [first_of_run(blocks, headings, index) for index in chapters]


def first_of_run(blocks: list[Block], headings: dict[int, int], index: int) -> int:
    """The first of the headings that stand one under the other down to this one: BOOK I, CHAPTER I, its title."""
    while headings.get(index - 1) == len(blocks[index - 1].lines):
        index -= 1
    return index


def find_headings(blocks: list[Block]) -> dict[int, int]:
    entries = contents_entries(blocks)
    headings = {}
    last = 0
    for index, block in enumerate(blocks):
        if num_lines := named_heading_lines(block):
            headings[index] = num_lines
        elif len(block.lines) < TITLE_LINES and entries.get(bare_title(" ".join(block.lines)), math.inf) < block.first:
            headings[index] = len(block.lines)
        elif number := numeral_of(block):
            if number == 1 or last < number <= last + NUMERALS_SKIPPED:
                headings[index] = len(block.lines)
            last = number
    return headings


def named_heading_lines(block: Block) -> int:
    """How many lines are a heading that names itself: Chapter 12, BOOK THE FIRST, PREFACE; with its title."""
    line = block.lines[0]
    is_short = len(block.lines) <= TITLE_LINES and sum(map(len, block.lines)) <= TITLE_CHARACTERS
    numbered = NUMBERED.match(line)
    if numbered:
        rest = line[numbered.end() :]
        if not rest.strip(" .:,-—–_*"):
            return len(block.lines) if is_short and is_title(" ".join(block.lines[1:])) else 1
        return len(block.lines) if is_short and TITLE_AFTER_NUMBER.match(rest) else 0
    return len(block.lines) if is_short and SECTION.fullmatch(" ".join(block.lines)) else 0


def contents_entries(blocks: list[Block]) -> dict[str, int]:
    """The titles in the table of contents, which ends where prose begins, each with the line where it first stands."""
    opening = next((index for index, block in enumerate(blocks) if CONTENTS.fullmatch(block.lines[0])), len(blocks))
    entries: dict[str, int] = {}
    for block in takewhile(lambda block: not is_prose(block), blocks[opening:]):
        for number, line in enumerate(block.lines, block.first):
            if title := bare_title(line):
                entries.setdefault(title, number)
    return entries


def is_prose(block: Block) -> bool:
    """Full lines that end a sentence, as no list of titles and no verse does."""
    full = sum(1 for line in block.lines if len(line) >= FULL_LINE_CHARACTERS)
    return (
        full >= 2
        and full >= len(block.lines) - 1
        and block.lines[-1][-1] in ".!?:;,—-\"”’'"
        and not is_listing(block.lines)
    )


def bare_title(line: str) -> str:
    """Its letters alone, without a chapter's number before and a page's after it; empty if there are too few."""
    page = find_page(PAGE_AT_END, line)
    title = ENTRY_NUMBER.sub("", line[: page.start()] if page else line)
    letters = "".join(filter(str.isalpha, title)).casefold()
    return letters if len(letters) > 3 and (line[0].isalnum() or line.isupper()) and line[0] != "[" else ""


def numeral_of(block: Block) -> int:
    """The number of a heading that is a numeral, alone or with a title after it; 0 if it is none."""
    found = NUMERAL.fullmatch(block.lines[0])
    if not found or len(block.lines) >= TITLE_LINES or (found[2] and block.gap == 1):
        return 0
    title = " ".join([found[2] or "", *block.lines[1:]]).strip()
    if not is_title(title):
        return 0
    return int(found[1]) if found[1].isdigit() else roman(found[1])


def roman(numeral: str) -> int:
    values = [ROMAN_VALUES[letter] for letter in numeral]
    signed = (-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))
    return sum(signed) if ROMAN.fullmatch(numeral) else 0


def is_title(text: str) -> bool:
    """Capitals, or a few words that end as no sentence and no verse does; nothing at all is a title too."""
    return text == text.upper() or (
        len(text) <= 80 and text[0] in OPENS_TITLE + text[0].upper() and text[-1] not in ",;:?!-"
    )


def is_capital_title(block: Block) -> bool:
    text = " ".join(block.lines)
    letters = sum(map(str.isalpha, text))
    return text.isupper() and letters > 3 and len(text) <= 80 and text[-1] not in ",;:-"


def title_lines(blocks: list[Block], headings: dict[int, int]) -> dict[int, int]:
    """The blocks that are a title under a heading."""
    return {
        index + 1: len(blocks[index + 1].lines)
        for index, num_lines in headings.items()
        if num_lines == len(blocks[index].lines)
        and index + 1 < len(blocks)
        and index + 1 not in headings
        and len(blocks[index + 1].lines) < TITLE_LINES
        and is_capital_title(blocks[index + 1])
    }


def full_headings(blocks: list[Block], headings: dict[int, int]) -> list[int]:
    """Those with as much text under them, up to the next heading, as makes a chapter."""
    full = []
    opening, characters = -1, 0
    for index, block in enumerate([*blocks, Block(0, 1, [])]):
        if index in headings or index == len(blocks):
            if opening >= 0 and characters >= MIN_CHAPTER_CHARACTERS:
                full.append(opening)
            opening, characters = index, 0
        characters += text_size(Block(0, 0, block.lines[headings.get(index, 0) :]))
    return full


def text_size(block: Block) -> int:
    return 0 if is_listing(block.lines) else sum(map(len, block.lines))


def is_listing(lines: list[str]) -> bool:
    """Lines of a table of contents or an index: most end in a page's number."""
    pattern = PAGE_AT_END if len(lines) > 1 else WIDE_GAP_PAGE
    return 2 * sum(1 for line in lines if line and line[-1] in PAGE_ENDS and find_page(pattern, line)) > len(lines)


def find_page(pattern: re.Pattern[str], line: str) -> re.Match[str] | None:
    """Looks at the line's last characters only: from each space of a wide gap the pattern reads all of the gap."""
    return pattern.search(line, max(0, len(line) - PAGE_CHARACTERS))


def clean_text(blocks: list[str], opens_book: bool) -> str:
    """Paragraphs one a line, without pictures, page numbers, contents and index, and the credits that open a book."""
    paragraphs = BLANK_LINES.split(NOT_PROSE.sub("", "\n\n".join(blocks)).strip())
    credits_within = CREDITS_WITHIN if opens_book else 0
    return one_a_line(
        ITALICS.sub(r"\1", paragraph)
        for index, paragraph in enumerate(paragraphs)
        if not (index < credits_within and CREDITS.match(paragraph.strip())) and not is_listing(paragraph.split("\n"))
    )
