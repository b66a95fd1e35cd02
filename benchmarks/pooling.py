"""What training heads on hidden states costs: on the fly beside a plain forward pass, from a cache beside on the fly,
eight heads in one pass beside one; side by side in the same turns: a record.

python -m benchmarks.pooling --record FILE            # BERT-Base's shape, T=128, A=16
python -m benchmarks.pooling --layers 2 --width 64 --intermediate 128 --num-heads 2 --vocabulary 100 --tokens 16
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import BertConfig, BertModel

from benchmarks.record import hardware, heading, table, this_command, write_record
from mslt.evaluate.fine_tune import FineTuning
from mslt.evaluate.pool import BatchOf, Pooled, from_cache, head_settings, on_the_fly, train_heads
from mslt.evaluate.pool_cache import cache_bytes, make_cache
from mslt.evaluate.pool_data import Collate, Example, PoolTask
from mslt.heads.pooling import backbone_of, new_head
from mslt.provenance import provenance

COLUMNS = ["what", "samples/s", "turns from – to", "beside", "times"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--intermediate", type=int, default=3072)
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--adapter-width", type=int, default=16)
    parser.add_argument("--num-rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cache-folder", type=Path, help="default: a folder of the system's temporary ones")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    model = BertModel(
        BertConfig(num_hidden_layers=arguments.layers, hidden_size=arguments.width, vocab_size=arguments.vocabulary,
                   intermediate_size=arguments.intermediate, num_attention_heads=arguments.num_heads)
    ).eval()  # fmt: skip
    task = made_up(arguments.num_rows, arguments.tokens, arguments.vocabulary)
    collate = Collate(task, pad_id=0, has_types=True)
    states = range(arguments.layers + 1)
    with tempfile.TemporaryDirectory(dir=arguments.cache_folder) as folder:
        sha256 = backbone_of(model)["backbone_sha256"]
        cache = make_cache(Path(folder) / "cache", model, sha256, task.train, collate, states, "bf16", 1e3)
        computed = on_the_fly(task.train, collate)
        read = from_cache(cache, task.train, collate, states)

        def heads(count: int) -> Pooled:
            own = head_settings(task, arguments.width, (0, arguments.layers), "adapter", arguments.adapter_width,
                                "flatten", "zero", False)  # fmt: skip
            return Pooled(model, [new_head(own, model, seed) for seed in range(count)])

        one, same, eight = heads(1), heads(1), heads(8)
        runs = {
            "plain forward pass": lambda: forward(model, computed, arguments.num_rows, arguments.batch_size),
            "on the fly": lambda: trained(one, computed, arguments.num_rows, arguments.batch_size),
            "from the cache": lambda: trained(same, read, arguments.num_rows, arguments.batch_size),
            "eight heads from the cache": lambda: trained(eight, read, arguments.num_rows, arguments.batch_size),
        }
        turns = [{name: timed(run) for name, run in runs.items()} for _ in range(arguments.turns + 1)][1:]
    size = cache_bytes(arguments.num_rows * arguments.tokens, len(states), arguments.width, "bf16")
    compared = (
        ("plain forward pass", None, None),
        ("on the fly", "plain forward pass", "time of"),
        ("from the cache", "on the fly", "speed of"),
        ("eight heads from the cache", "from the cache", "time of"),
    )
    rows = []
    for name, other, what in compared:
        seconds = [turn[name] for turn in turns]
        speeds = [arguments.num_rows / each for each in seconds]
        times = ""
        if other is not None:
            ratios = [turn[name] / turn[other] for turn in turns]
            times = f"{median(ratios) if what == 'time of' else 1 / median(ratios):.2f}"
        rows.append([name, f"{arguments.num_rows / median(seconds):,.1f}", f"{min(speeds):,.1f} – {max(speeds):,.1f}",
                     f"{what} {other}" if other else "", times])  # fmt: skip
    lines = [
        *heading("Heads on hidden states: on the fly, from a cache, eight at once", this_command(), provenance(),
                 hardware()),
        f"{arguments.layers} layers × {arguments.width}, T={arguments.tokens} without padding, A="
        f"{arguments.adapter_width}, batch {arguments.batch_size}, {arguments.num_rows} rows, fp32, random weights, "
        f"{torch.get_num_threads()} threads. The cache is in bf16, {size / 1e9:.2f} GB, read through the system's page "
        "cache. Every side goes over all rows once in each turn, one after the other; a turn at the start is not "
        f"counted; medians of {arguments.turns}, of turn-by-turn quotients.",
        "",
        *table(COLUMNS, rows),
    ]  # fmt: skip
    write_record(arguments.record, lines)


def made_up(num_rows: int, num_tokens: int, vocabulary: int) -> PoolTask:
    draw = np.random.default_rng(0)
    examples = [
        Example(draw.integers(1, vocabulary, num_tokens, np.int32), np.zeros(num_tokens, np.int8), (row % 2,))
        for row in range(num_rows)
    ]
    return PoolTask("made-up", 2, False, False, ("0", "1"), num_tokens, "accuracy", examples, list(range(num_rows)), {},
                    lambda split, rows, said: {}, lambda split: "made-up")  # fmt: skip


@torch.no_grad()
def forward(model: BertModel, batch_of: BatchOf, num_rows: int, batch_size: int) -> None:
    for first in range(0, num_rows, batch_size):
        batch = batch_of(range(first, min(first + batch_size, num_rows)))
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
              token_type_ids=batch["token_type_ids"])  # fmt: skip


def trained(whole: Pooled, batch_of: BatchOf, num_rows: int, batch_size: int) -> Iterator[float]:
    return train_heads(whole, range(num_rows), batch_of, FineTuning(5e-4, batch_size, 1, 0), [5e-4] * len(whole.heads))


def timed(run: Callable[[], Iterator[float] | None]) -> float:
    began = time.perf_counter()
    for _ in run() or ():
        pass
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
