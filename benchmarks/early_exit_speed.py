"""What early exit saves by the clock, in batches and one row at a time, beside what its layers should save: a record.

mslt exit train CKPT --task SST-2 --data-dir GLUE --out EXITS …
python -m benchmarks.early_exit_speed EXITS … --data-dir GLUE --record FILE
"""

import argparse
from pathlib import Path

import torch

from benchmarks.record import hardware, heading, table, this_command, write_record
from mslt.evaluate.exit_bench import Timed, bench
from mslt.evaluate.exit_sweep import keep, rules_near, sweep
from mslt.evaluate.exits import Opened, exit_logits_of, heldout, open_exits
from mslt.provenance import provenance

COLUMNS = ["exits", "task", "layers", "rows", "at once", "rule", "score", "leaving at each exit", "expected saving",
           "measured saving", "speed", "turns from – to", "bound"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exits", nargs="+", type=Path, help="folders that `mslt exit train` wrote")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--subset", action="store_true", help="the files hold a part of GLUE")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--savings", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.6])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--max-rows", type=int)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    rows = []
    for folder in arguments.exits:
        opened = open_exits(folder, None, "cuda" if torch.cuda.is_available() else "cpu")
        name = opened.task.validation[0]
        split = heldout(opened.task, arguments.data_dir, arguments.subset, name)[: arguments.max_rows]
        kept = keep(opened, split, exit_logits_of(opened.exits, split, opened.batch_of))
        points = sweep(kept, rules_near(kept, arguments.savings))
        rules = [point.rule for point in points]
        for batch_size in arguments.batch_sizes:
            every = bench(opened, split, rules, batch_size, arguments.turns, lambda done, total: None)
            for point, timed in zip(points, every, strict=True):
                rows.append([folder.name, *_row(opened, point.scores[kept.metric], timed)])
    lines = [
        *heading("Early exit: measured saving beside expected", this_command(), provenance(), hardware()),
        f"Rows of the validation split; {torch.get_num_threads()} threads, fp32. `score` is the task's by that rule, a "
        "threshold in nats. Rows of like length share a batch, padded to its longest, the same for both sides; every "
        f"batch goes through the plain model and through every rule in turn, {arguments.turns} times; medians. The "
        "expected saving counts layers × rows; `bound` is what it allows.",
        "",
        *table(COLUMNS, rows),
    ]
    write_record(arguments.record, lines)


def _row(opened: Opened, score: float, timed: Timed) -> list[str]:
    config = opened.exits.model.config
    return [
        opened.task.name,
        f"{config.num_hidden_layers} × {config.hidden_size}",
        f"{timed.num_rows:,}",
        str(timed.batch_size),
        ", ".join(f"{threshold:.9g}" for threshold in timed.rule.thresholds) or str(timed.rule),
        f"{score:.4f}",
        " ".join(map(str, timed.num_leaving)),
        f"{timed.expected_saving:.1%}",
        f"{timed.measured_saving:.1%}",
        f"{timed.speedup:.2f}×",
        f"{min(timed.speedups):.2f} – {max(timed.speedups):.2f}",
        f"{1 / (1 - timed.expected_saving):.2f}×",
    ]


if __name__ == "__main__":
    main()
