"""Is reading wikitext fast enough? Our `strip` beside mwparserfromhell's `strip_code`, on the articles of a dump.

    python -m benchmarks.wikitext_speed DUMP [--record FILE]

DUMP is a MediaWiki dump (.xml, .xml.bz2, .xml.gz); some hundred articles do. One core. The two take turns on each
article, so that a busy machine slows both. Exit status 1 when `strip` does less than 0.8 of the pages per second.
"""

import argparse
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median

import mwparserfromhell

from benchmarks.record import hardware, heading, table, this_command, write_record
from data_prep.wikipedia import read_blocks
from data_prep.wikitext import INLINE, drop_brackets, drop_elements, is_parsed, paragraphs, strip
from mslt.provenance import provenance

MIN_RATIO = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path)
    parser.add_argument("--pages", type=int, default=500, help="articles to read at most")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--record", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    pages = read_articles(options.dump, options.pages)
    runs = [measure(pages) for _ in range(options.repetitions)]
    lines, holds = report(options.dump, pages, runs)
    write_record(options.record, lines)
    sys.exit(0 if holds else 1)


def read_articles(dump: Path, num_pages: int) -> list[str]:
    """The wikitext of the dump's first articles, redirects left out."""
    blocks = read_blocks(dump, 0, dump.stat().st_size)
    pages = (ET.fromstring(b"".join(block.pieces)) for block in blocks if not block.problem)
    articles = (page for page in pages if page.findtext("ns") == "0" and page.find("redirect") is None)
    texts = (page.findtext("revision/text") or "" for page in articles)
    return list(islice(filter(None, texts), num_pages))


def strip_code(wikitext: str) -> str:
    return mwparserfromhell.parse(wikitext).strip_code()


def measure(pages: list[str]) -> tuple[float, float]:
    """Seconds of all pages: (strip_code, strip)."""
    spent_s = [0.0, 0.0]
    functions: list[Callable[[str], str]] = [strip_code, strip]
    for index, page in enumerate(pages):
        for which in (0, 1) if index % 2 else (1, 0):
            start = time.perf_counter()
            functions[which](page)
            spent_s[which] += time.perf_counter() - start
    return spent_s[0], spent_s[1]


def report(dump: Path, pages: list[str], runs: list[tuple[float, float]]) -> tuple[list[str], bool]:
    """The record's lines, and whether the criterion holds."""
    megabytes = sum(len(page.encode()) for page in pages) / 1e6
    rows = []
    for name, times_s in zip(("`strip_code`", "`strip`"), zip(*runs, strict=True), strict=True):
        spent_s = median(times_s)
        rates = [f"{len(pages) / t:.1f}" for t in (max(times_s), min(times_s))]
        rows.append([name, f"{len(pages) / spent_s:.1f}", " … ".join(rates), f"{megabytes / spent_s:.2f}"])
    ratio = median(theirs / ours for theirs, ours in runs)
    holds = ratio >= MIN_RATIO
    pieces = [piece for page in pages for piece in paragraphs(drop_brackets(drop_elements(page)))]
    num_parsed = sum(INLINE.search(piece) is not None and is_parsed(piece) for piece in pieces)
    lines = heading("Wikitext to text", this_command(), provenance(), hardware())
    lines += [
        f"mwparserfromhell {version('mwparserfromhell')}. {len(pages)} articles, {megabytes:.1f} MB of wikitext, of "
        f"`{dump.name}`; one core, {len(runs)} repetitions, the two in turns on each article; medians.",
        "",
        "`strip` uses mwparserfromhell too, but only for paragraphs with inline markup (quotes, tags, external links): "
        f"{num_parsed / len(pieces):.0%} of the {len(pieces):,} paragraphs. References, templates, tables and links it "
        "takes out itself before that, because mwparserfromhell is slow on what is deep, long or never closed, and a "
        "page may be all of it; `strip_code` gives it whole pages. So the two do not give the same text.",
        "",
        *table(["", "pages/s", "slowest … fastest", "MB/s"], rows),
        "",
        f"- {'held' if holds else 'MISSED'}: `strip` does at least {MIN_RATIO} of the pages per second of "
        f"`mwparserfromhell.parse(page).strip_code()`: {ratio:.2f}",
    ]
    return lines, holds


if __name__ == "__main__":
    main()
