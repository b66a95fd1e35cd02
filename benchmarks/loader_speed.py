"""How fast are samples made, and how soon is the order of a large corpus known?

    python -m benchmarks.loader_speed SHARDS [--record FILE] [--sentences N]

On one core, interleaved: batches of 256 at T=128, pairs and masks included, beside Hugging Face's
DataCollatorForLanguageModeling, which only masks, on the same sequences ready-made in each form it takes. Then the
index of a synthetic corpus (arrays alone), built, and entered at sample 30 million with the cache filled.
Exit status 1 when a target is missed.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from benchmarks.record import hardware, heading, table, this_command, write_record
from mslt.config import DataConfig
from mslt.data.cache import Arrays, cached
from mslt.data.loader import Samples
from mslt.data.masking import IGNORED_LABEL
from mslt.data.shards import Shards, open_shards
from mslt.provenance import provenance

LENGTH, BATCH, SEED = 128, 256, 0
CALLS, REPETITIONS = 10, 15
JUMP = 30_000_000

MIN_SAMPLES_PER_S = 20_000
MIN_SPEEDUP = 1.5
MAX_JUMP_S = 1.0


class SyntheticShards:
    """Stands in for Shards: documents of 1 … 41 sentences of 5 … 53 tokens, as in Wikipedia on average; the text is
    the real split's first block, over and over."""

    folder, split = Path("synthetic"), "train"

    def __init__(self, real: Shards, num_sentences: int) -> None:
        generator = np.random.default_rng(SEED)
        sizes = generator.integers(1, 42, num_sentences // 21)
        self.document_starts = np.concatenate([[0], np.cumsum(sizes)])
        self.num_documents, self.num_sentences = len(sizes), int(self.document_starts[-1])
        self.token_starts = np.concatenate([[0], np.cumsum(generator.integers(5, 54, self.num_sentences))])
        self.special_ids, self.vocab_size, self.is_continuation_V = real.special_ids, real.vocab_size, None
        self.text = real.token_blocks[0]

    def token_runs(self, first_token: np.ndarray, num_tokens: np.ndarray) -> list[np.ndarray]:
        start = first_token % (len(self.text) - LENGTH)
        return [self.text[i:j] for i, j in zip(start.tolist(), (start + num_tokens).tolist(), strict=True)]

    def shared(self, name: str, key: dict[str, Any], make: Callable[[], Arrays], *how: Any) -> Arrays:
        return cached(f"synthetic-{self.num_sentences}", name, key, make, *how[:1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--record", type=Path, help="Markdown file to write")
    parser.add_argument("--sentences", type=int, default=35_000_000, help="of the synthetic corpus")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shards = open_shards(options.shards, "train")
    rates = samples_per_s(shards)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MSLT_CACHE"] = folder
        index = index_times(SyntheticShards(shards, options.sentences))
    lines, holds = report(rates, index)
    if options.record:
        write_record(options.record, lines)
    else:
        print("\n".join(lines))
    sys.exit(0 if holds else 1)


def samples_per_s(shards: Shards) -> dict[str, list[float]]:
    """Rates of each way, one for each repetition. All ways take turns, so that a busy machine is busy for all."""
    tokenizer = AutoTokenizer.from_pretrained(shards.tokenizer_folder)
    samples = Samples(shards, DataConfig(shards=""), LENGTH, SEED)
    whole_words = Samples(shards, DataConfig(shards="", whole_word_masking=True), LENGTH, SEED)
    forms = ready_made(samples)
    to_torch = DataCollatorForLanguageModeling(tokenizer)
    to_numpy = DataCollatorForLanguageModeling(tokenizer, return_tensors="np")
    position = iter(range(0, 10**9, BATCH))
    ways: dict[str, Callable[[], Any]] = {
        "mslt, pairs and masks": lambda: samples.batch(range(first := next(position), first + BATCH)),
        "mslt, pairs and whole words": lambda: whole_words.batch(range(first := next(position), first + BATCH)),
        "collator, lists to torch": lambda: to_torch([dict(row) for row in forms["lists"]]),
        "collator, lists to numpy": lambda: to_numpy([dict(row) for row in forms["lists"]]),
        "collator, padded tensors to torch": lambda: to_torch(forms["tensors"]),
        "collator, padded arrays to numpy": lambda: to_numpy(forms["arrays"]),
    }
    for way in ways.values():
        way()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPETITIONS):
        for name, way in ways.items():
            started = time.perf_counter()
            for _ in range(CALLS):
                way()
            rates[name].append(CALLS * BATCH / (time.perf_counter() - started))
    return rates


def ready_made(samples: Samples) -> dict[str, list[Any]]:
    """A batch's sequences before masking, in the forms that the collator takes."""
    batch = {name: tensor.numpy() for name, tensor in samples.batch(range(BATCH)).items()}
    row, slot = np.nonzero(batch["mlm_labels"] != IGNORED_LABEL)
    batch["input_ids"][row, batch["mlm_positions"][row, slot]] = batch["mlm_labels"][row, slot]
    special = np.isin(batch["input_ids"], samples.shards.special_ids).astype(np.int64)
    lengths = batch["attention_mask"].sum(1).tolist()
    return {
        "lists": [
            {"input_ids": ids[:length].tolist(), "special_tokens_mask": mask[:length].tolist()}
            for ids, mask, length in zip(batch["input_ids"], special, lengths, strict=True)
        ],
        "tensors": [torch.from_numpy(ids) for ids in batch["input_ids"]],
        "arrays": list(batch["input_ids"]),
    }


def index_times(shards: SyntheticShards) -> dict[str, float]:
    """Seconds to build an epoch's index, to enter at sample JUMP from nothing, and again with the cache filled."""

    def samples() -> Samples:
        return Samples(shards, DataConfig(shards=""), LENGTH, SEED)  # type: ignore[arg-type]

    fresh = samples()
    started = time.perf_counter()
    fresh.order.index(0)
    built = time.perf_counter()
    fresh.batch(range(JUMP, JUMP + BATCH))
    entered = time.perf_counter()
    warm = []
    for _ in range(5):
        again = samples()
        started_again = time.perf_counter()
        again.batch(range(JUMP, JUMP + BATCH))
        warm.append(time.perf_counter() - started_again)
    epoch_B, _ = fresh.order.locate(np.array([JUMP]))
    return {
        "sentences": shards.num_sentences,
        "samples": fresh.order.num_samples(0),
        "epoch": int(epoch_B[0]),
        "build_s": built - started,
        "cold_jump_s": entered - built,
        "jump_s": statistics.median(warm),
    }


def report(rates: dict[str, list[float]], index: dict[str, float]) -> tuple[list[str], bool]:
    """The record's lines, and whether every target is reached."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = medians["mslt, pairs and masks"]
    best = max((name for name in medians if name.startswith("collator")), key=lambda name: medians[name])
    targets = {
        f"at least {MIN_SAMPLES_PER_S:,} samples/s: {ours:,.0f}": ours >= MIN_SAMPLES_PER_S,
        f"at least {MIN_SPEEDUP} times the collator's best ({best}): {ours / medians[best]:.2f}": (
            ours >= MIN_SPEEDUP * medians[best]
        ),
        f"enters at sample {JUMP:,} within {MAX_JUMP_S} s once the index stands: {index['jump_s']:.2f} s": (
            index["jump_s"] <= MAX_JUMP_S
        ),
    }
    rows = [
        [name, f"{medians[name]:,.0f}", f"{min(values):,.0f}", f"{max(values):,.0f}", f"{medians[name] / ours:.2f}"]
        for name, values in rates.items()
    ]
    lines = heading("Making samples", this_command(), provenance(), hardware())
    lines += [
        f"T={LENGTH}, batches of {BATCH}, one process on one core, {REPETITIONS} interleaved repetitions of {CALLS} "
        "batches. The collator only masks; its sequences were made before.",
        "",
        *table(["samples/s", "median", "least", "most", "of mslt"], rows),
        "",
        f"Index of a synthetic corpus of {index['sentences']:,} sentences: {index['samples']:,} samples an epoch, "
        f"built in {index['build_s']:.1f} s; entered at sample {JUMP:,} (epoch {index['epoch']:.0f}) in "
        f"{index['cold_jump_s']:.1f} s while later epochs are made, in {index['jump_s']:.2f} s once they stand.",
        "",
        *(f"- {'reached' if holds else 'MISSED'}: {target}" for target, holds in targets.items()),
    ]
    return lines, all(targets.values())


if __name__ == "__main__":
    main()
