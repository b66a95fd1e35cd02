"""Wikipedia: MediaWiki's XML dumps, plain, .bz2 or .gz, and files that WikiExtractor made of them.

A plain dump is read from any byte on. A .bz2 is read from any of its streams on, and a multistream dump has one for
every 100 pages: their starts are found by their magic bytes in the file itself, so no index file is needed, and none
can disagree with the dump. A part owns the pages that start in its share and reads on to finish the last of them, so
it does not matter where streams are cut: pbzip2's, which end in the middle of a page, read as well. A .bz2 of one
stream and a .gz have to be read from the start: one part, one core. A dump that does not end with `</mediawiki>` was
cut short, and is an error.
"""

import bz2
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_prep import wikiextractor, wikitext
from data_prep.documents import MAX_DOCUMENT_BYTES, PART_BYTES, Document, Part, find_files, list_files
from data_prep.recipe import FileSource
from data_prep.text import open_file
from mslt.errors import MsltError

# `….xml-p1p41242.bz2` is how Wikimedia names a share of a dump; its index, `…-index.txt.bz2`, fits neither.
DUMP = re.compile(r".+\.xml(-p\d+p\d+)?(\.bz2|\.gz)?")
EXTRACTED = re.compile(r"wiki_\d+(\.bz2)?")
FILES = re.compile(f"{DUMP.pattern}|{EXTRACTED.pattern}")
MEANING = "dumps (.xml, .xml.bz2, .xml.gz) and WikiExtractor's output (wiki_00, wiki_01.bz2, …)"

CHUNK_BYTES = 2**20
HEAD_BYTES = 2**16
# The head of a stream and of its first block; streams, unlike blocks, start at a whole byte.
BZ2_STREAM = re.compile(rb"BZh[1-9]1AY&SY")
BZ2_STREAM_BYTES = 10
PACKED_PART_BYTES = PART_BYTES // 4  # .bz2 packs a dump to a quarter and less
ONE_CORE_BYTES = 200 * 10**6  # packed: some 0.8 GB of wikitext, two minutes of a core
TAG = re.compile(rb"</?page>|<mediawiki\b|</mediawiki>")  # in text, `<` is `&lt;`
LONGEST_TAG = len(b"</mediawiki>")
REDIRECT = re.compile(r"\s*#redirect\b", re.IGNORECASE)


def list_parts(source: FileSource) -> list[Part]:
    root = Path(source.path or ".").expanduser()
    files = find_files(root, FILES, MEANING)[: source.max_files]
    return list_files(root, files, cut)


def read_part(source: FileSource, part: Part) -> Iterator[Document]:
    """The pages that start in the part, each of them one document: articles with their text, all others dropped as
    "other_namespace", "redirect", "empty", "oversized" or "damaged". MsltError where the dump is damaged or cut short.
    """
    assert part.path is not None
    if not DUMP.fullmatch(part.path.name):
        yield from wikiextractor.read_part(source, part)
        return
    yield from map(read_page, read_blocks(part.path, part.start, part.end))


# Parts


def cut(path: Path) -> list[tuple[int, int]]:
    """(start, end) in bytes of the file's parts; MsltError if a file with a dump's name holds none, or the last part
    ends without </mediawiki>."""
    size = path.stat().st_size
    if not DUMP.fullmatch(path.name):
        return [(0, size)]
    check_dump(path)
    if path.suffix == ".gz":
        starts = [0]
    else:
        starts = group(stream_starts(path)) if path.suffix == ".bz2" else [*range(0, size, PART_BYTES)]
    if len(starts) > 1:
        for _ in read_blocks(path, starts[-1], size):  # so that one that is cut short is refused now, not after hours
            pass
    elif size > ONE_CORE_BYTES:
        print(
            f"warning: {path}: {size / 1e9:.1f} GB in one stream are read by one core, and from the start after a kill;"
            " the dump named …-multistream.xml.bz2 is read by all cores",
            file=sys.stderr,
        )
    return list(zip(starts, [*starts[1:], size], strict=True))


def check_dump(path: Path) -> None:
    head = b""
    for chunk in read_chunks(path, 0, 1):
        head += chunk.data
        if len(head) >= HEAD_BYTES:
            break
    if b"<mediawiki" not in head:
        raise MsltError(
            f"{path}: not a MediaWiki dump (it begins with {head[:40]!r}); "
            "give a …-pages-articles.xml, .xml.bz2 or .xml.gz, or take it out of the source"
        )


def stream_starts(path: Path) -> list[int]:
    """Where the .bz2's streams start. Empty ones are passed over: they belong to the stream before."""
    starts, tail, offset = [], b"", 0
    with open(path, "rb") as file:
        while data := file.read(CHUNK_BYTES):
            data = tail + data
            starts += [offset - len(tail) + match.start() for match in BZ2_STREAM.finditer(data)]
            offset += len(data) - len(tail)
            tail = data[-BZ2_STREAM_BYTES + 1 :]
    return starts


def group(starts: list[int]) -> list[int]:
    """Of the streams' starts, those that parts of about PACKED_PART_BYTES begin with; the first is the file's."""
    grouped = [0]
    for start in starts:
        if start - grouped[-1] >= PACKED_PART_BYTES:
            grouped.append(start)
    return grouped


# Bytes


class Chunk(NamedTuple):
    """`own`: it starts in the part that is read, not in one after it."""

    own: bool
    data: bytes


def read_chunks(path: Path, start: int, end: int) -> Iterator[Chunk]:
    """The dump from `start` on, unpacked, up to its end: whoever reads stops when the last page is whole."""
    if path.suffix == ".bz2":
        with open(path, "rb") as file:
            yield from read_bz2(path, file, start, end)
    else:
        with open_file(path) as file:
            yield from read_plain(file, start, sys.maxsize if path.suffix == ".gz" else end)


def read_plain(file: BinaryIO, start: int, end: int) -> Iterator[Chunk]:
    file.seek(start)
    while data := file.read(min(CHUNK_BYTES, max(0, end - file.tell()))):
        yield Chunk(True, data)
    while data := file.read(CHUNK_BYTES):
        yield Chunk(False, data)


def read_bz2(path: Path, file: BinaryIO, start: int, end: int) -> Iterator[Chunk]:
    file.seek(start)
    stream_start, packed = start, file.read(CHUNK_BYTES)
    while packed:
        decompressor = bz2.BZ2Decompressor()
        while not decompressor.eof:
            try:
                data = decompressor.decompress(packed, CHUNK_BYTES)
            except OSError as error:
                raise damaged(path, f"the bz2 stream at byte {stream_start:,} is damaged") from error
            if data:
                yield Chunk(stream_start < end, data)
            packed = file.read(CHUNK_BYTES) if decompressor.needs_input else b""
            if not packed and decompressor.needs_input and not decompressor.eof:
                raise damaged(path, f"it ends at byte {file.tell():,}, within the bz2 stream at byte {stream_start:,}")
        packed = decompressor.unused_data or file.read(CHUNK_BYTES)
        stream_start = file.tell() - len(packed)


def damaged(path: Path, what: str) -> MsltError:
    return MsltError(f"{path}: {what}; download it again and compare its md5 or sha1 with the dump's list")


# Pages


class Block(NamedTuple):
    """A page as found, from `<page>` to `</page>`, in pieces. `problem`: "damaged" where the end tag is missing,
    "oversized" beyond MAX_DOCUMENT_BYTES; of such a page only the beginning is held."""

    pieces: list[bytes]
    num_bytes: int
    problem: str = ""


def read_blocks(path: Path, start: int, end: int) -> Iterator[Block]:
    """The pages that start in a part. MsltError if it reads to the dump's end, and that is cut short."""
    is_whole = yield from split_pages(read_chunks(path, start, end))
    if not is_whole:
        raise damaged(path, "it is cut short: no </mediawiki> after the last page")


def split_pages(chunks: Iterable[Chunk]) -> Generator[Block, None, bool]:
    """The pages that start in own chunks; returns False where what began there was never ended. Whoever has the last
    page reads on to </mediawiki>, whichever part that is in. Holds no more than one page and one chunk."""
    page: Block | None = None  # the open one
    unended = False  # <mediawiki or a page began, and no </mediawiki> came
    rest = b""  # of the chunks so far: what may be the beginning of a tag
    offset = 0  # of `rest`
    own_end: int | None = None  # in the unpacked bytes, as `offset`
    for own, data in chunks:
        if not own and own_end is None:
            own_end = offset + len(rest)
        data = rest + data
        position = 0
        for tag in TAG.finditer(data):
            if page:
                closes = tag[0] == b"</page>"
                page = extend(page, data[position : tag.end() if closes else tag.start()])
                yield page if closes or page.problem else page._replace(problem="damaged")
                page = None
            if tag[0] == b"<page>":
                if own_end is not None and offset + tag.start() >= own_end:
                    return True
                page = Block([tag[0]], len(tag[0]))
            if tag[0] != b"</page>":
                unended = tag[0] != b"</mediawiki>"
            position = tag.end()
        kept = max(position, len(data) - LONGEST_TAG + 1)
        if page:
            page = extend(page, data[position:kept])
        rest, offset = data[kept:], offset + kept
        if not unended and own_end is not None and offset >= own_end:
            return True
    return not unended


def extend(page: Block, data: bytes) -> Block:
    """The page with `data` added, or only counted where it is too large."""
    num_bytes = page.num_bytes + len(data)
    if num_bytes > MAX_DOCUMENT_BYTES:
        return Block(page.pieces[:2], num_bytes, "oversized")
    page.pieces.append(data)
    return Block(page.pieces, num_bytes)


def read_page(block: Block) -> Document:
    """The page as a document. Each page is parsed on its own, so that there is no DTD to define entities, and damage
    to one does not reach the next. Of a page with its whole history, the last revision."""
    if block.problem:
        return Document("", block.num_bytes, block.problem)
    try:
        page = ET.fromstring(b"".join(block.pieces))
    except ET.ParseError:  # so it says for bytes that are no UTF-8, and for NUL
        return Document("", block.num_bytes, "damaged")
    text = page.findtext("revision[last()]/text") or ""
    num_bytes = len(text.encode())
    if page.findtext("ns", "0").strip() != "0":
        return Document("", num_bytes, "other_namespace")
    if page.find("redirect") is not None or REDIRECT.match(text):
        return Document("", num_bytes, "redirect")
    stripped = wikitext.strip(text)
    return Document(stripped, num_bytes, "" if stripped else "empty")
