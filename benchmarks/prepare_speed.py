"""How fast do cleaned documents become shards, beside what tokenizers alone takes?

    python -m benchmarks.prepare_speed DATA [--record FILE]

DATA holds wikipedia/extracted and books, as for benchmarks.real_text. One process, one core for either side, taken in
turns: sentences, tokens and a shard on disk, against `encode_batch` of the same documents with the same vocabulary,
its result thrown away. Exit status 1 when the ratio is under 0.6.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

# Before tokenizers is loaded: one core for either side.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tokenizers import Tokenizer

from benchmarks.record import hardware, heading, table, write_record
from data_prep.cleaning import normalise
from data_prep.recipe import FileSource
from data_prep.sentences import split_sentences
from data_prep.sources import list_pieces, read_piece
from data_prep.tokenizing import encode
from data_prep.vocabulary import build_tokenizer, train_vocabulary
from mslt.data.shards import write_shard
from mslt.provenance import provenance

TARGET = 0.6
REPETITIONS = 7
TEXT_BYTES = 12_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--record", type=Path, help="Markdown file to write, beside printing it")
    options = parser.parse_args()
    texts = [text for kind in ("wikipedia/extracted", "books") for text in read_texts(options.data / kind)]
    tokens = train_vocabulary(lambda: texts, 30522, lowercase=True, min_frequency=2)
    tokenizer = build_tokenizer(tokens, lowercase=True)
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "documents to shards": lambda: to_shard(tokenizer, texts, Path(folder) / "train-00000.arrow"),
            "bare encode_batch": lambda: bare(tokenizer, texts),
            "sentences alone": lambda: sum(len(split_sentences(text)) for text in texts),
        }
        seconds = time_in_turns(contenders)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ratios = [
        bare / ours for ours, bare in zip(seconds["documents to shards"], seconds["bare encode_batch"], strict=True)
    ]
    ratio = statistics.median(ratios)
    lines = heading(
        "From cleaned documents to shards", "python -m benchmarks.prepare_speed DATA", provenance(), hardware()
    )
    lines += [
        f"{megabytes:.1f} MB of Wikipedia and books, {len(texts):,} documents, a vocabulary of {len(tokens):,}; one "
        f"process on one core, {REPETITIONS} repetitions in turns.",
        "",
        *table(
            ["what", "median s", "spread s", "MB/s"],
            [
                [
                    name,
                    f"{statistics.median(s):.2f}",
                    f"{min(s):.2f} to {max(s):.2f}",
                    f"{megabytes / statistics.median(s):.1f}",
                ]
                for name, s in seconds.items()
            ],
        ),
        "",
        f"Median ratio of speeds, ours to bare `encode_batch`: **{ratio:.2f}** "
        f"({min(ratios):.2f} to {max(ratios):.2f}); the aim was {TARGET}: {'held' if ratio >= TARGET else 'MISSED'}.",
    ]
    write_record(options.record, lines)
    sys.exit(0 if ratio >= TARGET else 1)


def read_texts(path: Path) -> list[str]:
    """Cleaned documents of one source, half of TEXT_BYTES."""
    kind = "books" if path.name == "books" else "wikipedia"
    pieces = list_pieces((FileSource(kind=kind, path=str(path)),))
    texts, size = [], 0
    for piece in pieces:
        for document in read_piece(piece):
            if document.text:
                texts.append(normalise(document.text))
                size += len(texts[-1])
            if size > TEXT_BYTES / 2:
                return texts
    return texts


def to_shard(tokenizer: Tokenizer, texts: list[str], path: Path) -> None:
    with write_shard(path, tokenizer.get_vocab_size()) as writer:
        for sentences in encode(tokenizer, ("\n".join(split_sentences(text)) for text in texts)):
            if sentences:
                writer.add(sentences)


def bare(tokenizer: Tokenizer, texts: list[str]) -> None:
    remaining = iter(texts)
    while group := list(islice(remaining, 256)):
        tokenizer.encode_batch(group, add_special_tokens=False)


def time_in_turns(contenders: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of every repetition. The machine's load goes up and down: all run in every turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(REPETITIONS):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
