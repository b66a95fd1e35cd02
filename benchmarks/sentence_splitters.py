"""Which sentence splitter for English Wikipedia and books? Boundaries against marks made by hand, and speed.

    python -m benchmarks.sentence_splitters DATA [--record FILE]

DATA holds wikipedia/extracted (WikiExtractor's output) and books (Project Gutenberg). Splitters other than ours are
measured where they can be imported (pip install blingfire pysbd syntok spacy sentence-splitter nltk) and named where
not.

The gold, sentence_gold.json: paragraphs of Wikipedia and of books, drawn at random by `draw_paragraphs`, read and
marked by hand. Draw 1 is what the rules of `data_prep.sentences` were made with; draw 2 was taken and marked when they
were fixed. The file holds no text, only where to find each paragraph (file, SHA-256 of the text with its white space
normalised) and offsets of the sentences' first characters:
- `boundaries`: where a sentence must begin, but for the paragraph's first. A sentence keeps its quotation and who said
  it (`"Did he?" she asked.`; `He said: "No."`); abbreviations, initials, numbers (`No. 6`), ellipses, semicolons,
  colons and marks before a small letter do not end it.
- `quoted`: those of them inside a quotation of several sentences. It is split like other text: packing and the next
  sentence task want the smallest whole units, and a quoted letter of a page is not one. The last of its sentences
  keeps who said it.
- `optional`: splitting and not splitting are both right (the speaker's name in a play, stage directions).
"""

import argparse
import hashlib
import html
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from benchmarks.record import hardware, heading, table, write_record
from data_prep.sentences import split_sentences
from mslt.provenance import provenance

GOLD = Path(__file__).with_name("sentence_gold.json")
CORPORA = {"wikipedia": "wikipedia/extracted/*", "books": "books/*.txt"}
DRAWS = {1: (20261121, 60), 2: (20261122, 40)}  # seed, paragraphs of each corpus
MAX_CHARACTERS = 1500  # of a paragraph drawn, so that 200 can be read
SENTENCE_MARK = re.compile(r"""[.!?…]["'”’)\]]*(?=\s|$)""")
REPETITIONS = 5
SPEED_BYTES = 2_000_000  # of each corpus
TRIAL_BYTES = 50_000
# One paragraph of nothing else, at two lengths: four times the length must not take much more than four times the time.
HOSTILE = (
    "word ",
    "He is. ",
    "“He is. ",
    '"',
    '" ',
    "“",
    ".",
    ". ",
    ".\u00a0",
    "!",
    "…",
    "1. ",
    "A. ",
    "a? b ",
    "(",
    "[1]",
)
HOSTILE_CHARACTERS = (2_500_000, 10_000_000)
REPETITION_S = 8.0  # a slow splitter gets as much of the text as it manages in this time

Splitter = Callable[[str], list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--record", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    splitters, missing = make_splitters(draw_text(options.data))
    gold = find_gold(options.data)
    rates = measure_speed(splitters, draw_text(options.data))
    lines = report(splitters, missing, gold, rates)
    if options.record:
        write_record(options.record, lines)
    else:
        print("\n".join(lines))


# Text


def read_paragraphs(path: Path) -> Iterator[str]:
    """The paragraphs of a file with their white space normalised: lines of Wikipedia; of a book, what stands between
    blank lines, without Gutenberg's header and footer."""
    text = path.read_text(errors="replace")
    if path.suffix == ".txt":
        start, end = re.search(r"\*\*\* ?START.*?\n", text), re.search(r"\*\*\* ?END", text)
        pieces = re.split(r"\n\s*\n", text[start.end() if start else 0 : end.start() if end else len(text)])
    else:
        lines = text.split("\n")
        pieces = [html.unescape(line) for line in lines if not line.startswith(("<doc ", "</doc"))]
    yield from (" ".join(piece.split()) for piece in pieces)


def draw_paragraphs(data: Path, draw: int) -> list[tuple[str, str]]:
    """(file, paragraph) of the gold: as many of each corpus with three sentence marks or more."""
    seed, num_paragraphs = DRAWS[draw]
    rng = random.Random(seed)
    drawn = []
    for pattern in CORPORA.values():
        found = [
            (path.relative_to(data).as_posix(), paragraph)
            for path in sorted(data.glob(pattern))
            for paragraph in read_paragraphs(path)
            if len(paragraph) <= MAX_CHARACTERS and len(SENTENCE_MARK.findall(paragraph)) >= 3
        ]
        drawn += rng.sample(found, num_paragraphs)
    return drawn


def draw_text(data: Path) -> list[str]:
    """SPEED_BYTES of paragraphs of each corpus from its whole breadth, in random order."""
    rng = random.Random(0)
    text = []
    for pattern in CORPORA.values():
        paths = sorted(data.glob(pattern))
        budget = SPEED_BYTES
        for path in rng.sample(paths, len(paths)):
            paragraphs = [paragraph for paragraph in read_paragraphs(path) if paragraph]
            for paragraph in paragraphs[: len(paragraphs) // 4]:
                text.append(paragraph)
                budget -= len(paragraph.encode())
            if budget <= 0:
                break
    rng.shuffle(text)
    return text


@dataclass(frozen=True)
class Gold:
    draw: int
    corpus: str
    text: str
    boundaries: frozenset[int]
    quoted: frozenset[int]
    optional: frozenset[int]


def find_gold(data: Path) -> list[Gold]:
    gold = []
    for entry in json.loads(GOLD.read_text()):
        texts = (t for t in read_paragraphs(data / entry["file"]) if hash_paragraph(t) == entry["sha256"])
        text = next(texts, None)
        if text is None:
            sys.exit(f"{data / entry['file']}: paragraph {entry['sha256'][:12]} is not in it; is DATA another edition?")
        marks = (frozenset(entry[kind]) for kind in ("boundaries", "quoted", "optional"))
        gold.append(Gold(entry["draw"], entry["file"].split("/")[0], text, *marks))
    return gold


def hash_paragraph(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# Splitters


def make_splitters(text: list[str]) -> tuple[dict[str, Splitter], list[str]]:
    """Those that can be imported, by name with version; the names of the others. `text` is what NLTK's Punkt learns
    from: its own English parameters are a download."""
    makers: dict[str, tuple[str, Callable[[], Splitter]]] = {
        "mslt (`split_sentences`)": ("sentencex", lambda: split_sentences),
        "sentencex": ("sentencex", make_sentencex),
        "blingfire": ("blingfire", make_blingfire),
        "pysbd": ("pysbd", make_pysbd),
        "syntok": ("syntok", make_syntok),
        "spacy sentencizer": ("spacy", make_spacy),
        "sentence-splitter (Moses)": ("sentence-splitter", make_moses),
        "nltk Punkt, trained on the text": ("nltk", lambda: make_punkt(text)),
    }
    splitters, missing = {}, []
    for name, (package, make) in makers.items():
        try:
            splitter = make()
        except ImportError:
            missing.append(name)
            continue
        title = f"{name}, sentencex" if package == "sentencex" and name != package else name
        splitters[f"{title} {version(package)}"] = splitter
    return splitters, missing


def make_sentencex() -> Splitter:
    sentencex = import_module("sentencex")
    return lambda text: sentencex.segment("en", text)


def make_blingfire() -> Splitter:
    blingfire = import_module("blingfire")
    return lambda text: blingfire.text_to_sentences(text).split("\n")


def make_pysbd() -> Splitter:
    return import_module("pysbd").Segmenter(language="en", clean=False).segment


def make_syntok() -> Splitter:
    segmenter = import_module("syntok.segmenter")

    def split(text: str) -> list[str]:
        starts = [sentence[0].offset for paragraph in segmenter.analyze(text) for sentence in paragraph]
        return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]

    return split


def make_spacy() -> Splitter:
    nlp = import_module("spacy").blank("en")
    nlp.add_pipe("sentencizer")
    return lambda text: [sentence.text for sentence in nlp(text).sents]


def make_moses() -> Splitter:
    return import_module("sentence_splitter").SentenceSplitter(language="en").split


def make_punkt(text: list[str]) -> Splitter:
    return import_module("nltk.tokenize.punkt").PunktSentenceTokenizer("\n".join(text)).tokenize


# Quality


def find_boundaries(text: str, sentences: list[str]) -> set[int]:
    """Offsets of the sentences' first characters, but for the paragraph's first sentence."""
    starts, end = [], 0
    for sentence in filter(None, map(str.strip, sentences)):
        start = text.find(sentence, end)
        assert start >= 0, f"the splitter changed the text: {sentence!r}"
        starts.append(start)
        end = start + len(sentence)
    return set(starts[1:])


@dataclass(frozen=True)
class Score:
    precision: float
    recall: float
    f1: float
    f1_unquoted: float  # boundaries inside quotations count neither way
    exact: float  # share of paragraphs exactly right
    per_paragraph: float  # sentences


def score(splitter: Splitter, gold: list[Gold]) -> Score:
    found = [find_boundaries(g.text, splitter(g.text)) for g in gold]
    judged: list[tuple[Set[int], Set[int]]] = [(f - g.optional, g.boundaries) for f, g in zip(found, gold, strict=True)]
    unquoted: list[tuple[Set[int], Set[int]]] = [
        (f - g.optional - g.quoted, g.boundaries - g.quoted) for f, g in zip(found, gold, strict=True)
    ]
    return Score(
        *precision_recall_f1(judged),
        precision_recall_f1(unquoted)[2],
        statistics.mean(f == g for f, g in judged),
        statistics.mean(len(f) + 1 for f in found),
    )


def precision_recall_f1(pairs: list[tuple[Set[int], Set[int]]]) -> tuple[float, float, float]:
    right, found, true = (sum(map(len, sets)) for sets in zip(*((f & g, f, g) for f, g in pairs), strict=True))
    return right / max(found, 1), right / true, 2 * right / (found + true)


# Speed


def measure_speed(splitters: dict[str, Splitter], text: list[str]) -> dict[str, list[float]]:
    """MB/s of every repetition; the splitters take turns, so that what else the machine does meets all of them."""
    trial = take(text, TRIAL_BYTES)
    shares = {}
    for name, splitter in splitters.items():
        time_splitter(splitter, trial[:10])  # lazy loading
        shares[name] = take(text, int(time_splitter(splitter, trial) * 1e6 * REPETITION_S))
    rates: dict[str, list[float]] = {name: [] for name in splitters}
    for _ in range(REPETITIONS):
        for name, splitter in splitters.items():
            rates[name].append(time_splitter(splitter, shares[name]))
    return rates


def take(text: list[str], num_bytes: int) -> list[str]:
    taken = []
    for paragraph in text:
        if num_bytes <= 0:
            break
        taken.append(paragraph)
        num_bytes -= len(paragraph.encode())
    return taken


def time_splitter(splitter: Splitter, text: list[str]) -> float:
    start = time.perf_counter()
    for paragraph in text:
        splitter(paragraph)
    return sum(len(paragraph.encode()) for paragraph in text) / 1e6 / (time.perf_counter() - start)


def time_hostile() -> list[list[str]]:
    """Rows of (what is repeated, seconds at each length, their ratio) of our splitter."""
    rows = []
    for unit in HOSTILE:
        seconds = []
        for length in HOSTILE_CHARACTERS:
            paragraph = unit * (length // len(unit))
            start = time.perf_counter()
            split_sentences(paragraph)
            seconds.append(time.perf_counter() - start)
        rows.append([f"`{unit!a}`", *(f"{s:.2f}" for s in seconds), f"{seconds[1] / seconds[0]:.1f}"])
    return rows


# Record


def report(
    splitters: dict[str, Splitter], missing: list[str], gold: list[Gold], rates: dict[str, list[float]]
) -> list[str]:
    lines = heading(
        "Sentence splitters", "python -m benchmarks.sentence_splitters DATA", dict(provenance()), hardware()
    )
    lines += [
        "Paragraphs of three sentence marks or more, drawn at random and marked by hand by one reader, with the rules "
        "in `benchmarks/sentence_splitters.py`. Draw 1 was looked at while the rules of `data_prep/sentences.py` were "
        "made, draw 2 marked when they were fixed.",
    ]
    for draw, (seed, num_paragraphs) in DRAWS.items():
        drawn = {corpus: [g for g in gold if (g.draw, g.corpus) == (draw, corpus)] for corpus in CORPORA}
        rows = [
            [f"{corpus}: {name}", *score_cells(score(splitter, drawn[corpus]))]
            for corpus in CORPORA
            for name, splitter in splitters.items()
        ]
        columns = ["splitter", "precision", "recall", "F1", "F1 outside quotations", "exact", "sentences"]
        lines += ["", f"## Draw {draw}: seed {seed}, {num_paragraphs} paragraphs of each corpus", ""]
        lines += [describe(drawn), "", *table(columns, rows)]
    rows = [[name, f"{statistics.median(r):.2f}", f"{min(r):.2f} – {max(r):.2f}"] for name, r in sorted_by_speed(rates)]
    lines += [
        "",
        "## Speed",
        "",
        f"One process, paragraph by paragraph, {2 * SPEED_BYTES / 1e6:.0f} MB of both corpora (a slow splitter: as "
        f"much as it manages in about {REPETITION_S:.0f} s), median of {REPETITIONS} interleaved repetitions. The "
        "machine was shared.",
        "",
        *table(["splitter", "MB/s", "spread"], rows),
    ]
    lengths = [f"s at {length / 1e6:g} M characters" for length in HOSTILE_CHARACTERS]
    lines += ["", "One paragraph that repeats one thing, `split_sentences`, one run:", ""]
    lines += table(["repeated", *lengths, "ratio"], time_hostile())
    if missing:
        lines += ["", f"Not measured, as not installed: {', '.join(missing)}."]
    return lines


def describe(drawn: dict[str, list[Gold]]) -> str:
    marked = (f"{sum(len(g.boundaries) for g in gold)} in {corpus}" for corpus, gold in drawn.items())
    quoted, optional = (
        sum(len(getattr(g, kind)) for c in drawn.values() for g in c) for kind in ("quoted", "optional")
    )
    return (
        f"Boundaries: {', '.join(marked)}; {quoted} of them inside quotations of several sentences. At {optional} more "
        "splitting and not splitting are both right, and count neither way."
    )


def score_cells(s: Score) -> list[str]:
    shares = (s.precision, s.recall, s.f1, s.f1_unquoted, s.exact)
    return [*(f"{share:.1%}" for share in shares), f"{s.per_paragraph:.2f}"]


def sorted_by_speed(rates: dict[str, list[float]]) -> list[tuple[str, list[float]]]:
    return sorted(rates.items(), key=lambda item: -statistics.median(item[1]))


if __name__ == "__main__":
    main()
