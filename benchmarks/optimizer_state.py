"""What carrying the optimizer's moments over growth does, beside starting them at 0: `schedule.optimizer_state`.

    python -m benchmarks.optimizer_state OUT [--seeds 3] [--record FILE]

The quickstart's corpus (the English that Python ships), a small model, the same everything else.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.record import hardware, heading, table, this_command, write_record
from mslt import metrics
from mslt.provenance import provenance
from mslt.rundir import RunDir, read_summaries

RECIPE = {
    "model": {
        "num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256,
        "vocab_size": 8192, "max_position_embeddings": 64,
    },
    "data": {"shards": "given on the command line", "max_predictions": 10, "evaluation_samples": 512},
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 30},
    "watch": {"log_every": 1, "checkpoint_every": 1000},
}  # fmt: skip
SCHEDULE = {"name": "mslt", "k": 3, "steps": 360, "retrain_share": 0.4}
AFTER_GROWTH = 20  # steps whose mean training loss shows what growth does at first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    run_verb("data", "prepare", "data-quickstart", out / "shards")
    found: dict[str, list[list[float]]] = {}
    for state in ("reset", "carry"):
        found[state] = [train(out, state, seed) for seed in range(options.seeds)]
    stages = ["2", "3", "retraining"]
    firsts, ends = ([f"{when} of stage {stage}" for stage in stages] for when in (f"first {AFTER_GROWTH} steps", "end"))
    columns = ["moments", *firsts, *ends]
    rows = [[state, *(spread(values) for values in zip(*seeds, strict=True))] for state, seeds in found.items()]
    by_seed = zip(found["carry"], found["reset"], strict=True)
    differences = [[c - r for c, r in zip(carry, reset, strict=True)] for carry, reset in by_seed]
    rows.append(["carry - reset, by seed", *(spread(values) for values in zip(*differences, strict=True))])
    head = heading("The optimizer's moments at growth", this_command(), provenance(), hardware())
    note = [
        "",
        f"MLM loss in nats: training loss over the first {AFTER_GROWTH} steps of a stage, held-out loss at its end; "
        f"mean ± standard deviation over {options.seeds} seeds. 6 layers × 64, k = 3, {SCHEDULE['steps']} steps of "
        "32, LAMB 0.01.",
    ]
    write_record(options.record, [*head, *table(columns, rows), *note])


def train(out: Path, state: str, seed: int) -> list[float]:
    training = {"sequence_length": 64, "batch_size": 32, "micro_batch_size": 32, "seed": seed}
    sections = {**RECIPE, "schedule": {**SCHEDULE, "optimizer_state": state}, "training": training}
    recipe, run = out / f"{state}-{seed}.yaml", RunDir(out / f"{state}-{seed}")
    recipe.write_text(yaml.safe_dump(sections))
    run_verb("train", recipe, "--shards", out / "shards", "--run-dir", run.path, "--workers", "1")
    records = [record for record in metrics.read(run.metrics) if record["kind"] == "train"]
    firsts = []
    for stage in (2, 3, 4):
        losses = [record["mlm_loss"] for record in records if record["stage"] == stage]
        firsts.append(statistics.fmean(losses[:AFTER_GROWTH]))
    return [*firsts, *(summary["evaluation_after"]["mlm_loss"] for summary in read_summaries(run)[1:])]


def spread(values: tuple[float, ...]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def run_verb(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "mslt.cli.main", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
