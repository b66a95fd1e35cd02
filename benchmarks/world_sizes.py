"""One run on 4, 2, 1 and 3 workers in turn, beside the same run on 2 throughout: same samples, same loss.

    python -m benchmarks.world_sizes OUT [--engine zero1_fp32] [--record FILE]

Each part is ended by SIGUSR1, as SLURM would, in the middle of another stage; dropout is off, so that only rounding
can differ.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from benchmarks.record import hardware, heading, table, this_command, write_record
from data_prep.prepare import prepare
from data_prep.recipe import DataRecipe
from mslt import metrics
from mslt.provenance import provenance
from mslt.rundir import RunDir, read_summaries
from mslt.validation import validate

WORLDS = (4, 2, 1, 3)
UNTIL = (40, 100, 190, None)  # steps at which the others take over, none at a stage's end (60, 120, 180, 240)
STEPS = 240
ALLOWED_NATS = 1e-4
RECIPE = {
    "model": {
        "num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128,
        "vocab_size": 1024, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "data": {"shards": "given on the command line", "max_predictions": 10, "evaluation_samples": 240},
    "schedule": {"name": "mslt", "k": 3, "steps": STEPS, "retrain_share": 0.25, "optimizer_state": "carry"},
    "training": {"sequence_length": 64, "batch_size": 24, "micro_batch_size": 4},
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 20},
    "watch": {"log_every": 1, "checkpoint_every": 50},
}  # fmt: skip
SOURCES = {
    "sources": [{"kind": "python_docs", "max_files": 300}], "vocabulary": {"size": 1024}, "validation_share": 0.1,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", default="zero1_fp32")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    shards, recipe = out / "shards", out / "recipe.yaml"
    if not shards.exists():
        prepare(validate(DataRecipe, SOURCES, "shards"), shards)
    recipe.write_text(yaml.safe_dump({**RECIPE, "engine": options.engine}))

    same, changing = RunDir(out / f"same-{options.engine}"), RunDir(out / f"changing-{options.engine}")
    subprocess.run(command(recipe, shards, same.path, 2), check=True)
    left_at = []
    for workers, until in zip(WORLDS, UNTIL, strict=True):
        train_until(command(recipe, shards, changing.path, workers), changing, until)
        left_at.append(max(record["step"] for record in metrics.read(changing.metrics)))

    expected, found = by_step(same), by_step(changing)
    same_samples = {s: r["samples"] for s, r in expected.items()} == {s: r["samples"] for s, r in found.items()}
    largest = max(abs(found[step]["mlm_loss"] - expected[step]["mlm_loss"]) for step in expected)
    ends = [read_summaries(run)[-1]["evaluation_after"]["mlm_loss"] for run in (same, changing)]
    holds = same_samples and abs(ends[1] - ends[0]) < ALLOWED_NATS
    worlds = ", ".join(f"{workers} until step {step}" for workers, step in zip(WORLDS, left_at, strict=True))
    rows = [
        ["workers", "2", worlds],
        ["samples consumed", str(expected[STEPS]["samples"]), str(found[STEPS]["samples"])],
        ["held-out MLM loss at the end", f"{ends[0]:.6f}", f"{ends[1]:.6f}"],
        [f"difference (allowed {ALLOWED_NATS:g})", "", f"{abs(ends[1] - ends[0]):.1e}"],
        ["largest difference of a step's training loss", "", f"{largest:.1e}"],
        ["holds", "", "yes" if holds else "NO"],
    ]
    title = f"One run on changing numbers of workers, {options.engine}"
    head = heading(title, this_command(), provenance(), hardware())
    write_record(options.record, [*head, *table(["", "2 throughout", "changing"], rows)])
    sys.exit(0 if holds else 1)


def command(recipe: Path, shards: Path, run: Path, workers: int) -> list[str]:
    arguments = ["train", recipe, "--shards", shards, "--run-dir", run, "--workers", workers]
    return [sys.executable, "-m", "mslt.cli.main", *map(str, arguments)]


def train_until(train: list[str], run: RunDir, step: int | None) -> None:
    """Train to the end, or tell it to leave once `step` is logged."""
    parent = subprocess.Popen(train)
    while step is not None and not any(record["step"] >= step for record in metrics.read(run.metrics)):
        assert parent.poll() is None, f"ended before step {step}"
        time.sleep(0.02)
    if step is not None:
        parent.send_signal(signal.SIGUSR1)
    status = parent.wait()
    assert status == (0 if step is None else 2), status


def by_step(run: RunDir) -> dict[int, dict[str, float]]:
    return {record["step"]: record for record in metrics.read(run.metrics) if record["kind"] == "train"}


if __name__ == "__main__":
    main()
