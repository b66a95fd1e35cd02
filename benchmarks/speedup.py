"""How much faster is a schedule end to end, and is that what `mslt plan --measure` says?

    python -m benchmarks.speedup RECIPE SHARDS OUT [--schedules full "mslt, k=4"] [--steps 60] [--rounds 7]
                                 [--workers N] [--record FILE]

In every round each schedule is timed (thirty steps) and then trained from its start to its end by `mslt train`, one
after the other; the seconds are those of training, without evaluating and saving. Exit status 1 where the median
prediction is more than 10 % from the median run.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.record import hardware, heading, shape, table, this_command, write_record
from benchmarks.workers import add_workers_option
from mslt.config import load_recipe
from mslt.cost import fit, medians, plan_total, probes
from mslt.engine.ds_config import read_engine_config
from mslt.forecast import alternatives
from mslt.launcher import time_stages_here
from mslt.provenance import provenance
from mslt.rundir import RunDir, read_summaries
from mslt.schedule import make_plan

MAX_OFF = 0.10
EVALUATION_SAMPLES = 64  # its time does not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--schedules", nargs="+", help="names as `mslt plan` lists them; default: full and the recipe's"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    add_workers_option(parser)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(options.recipe)
    fewer = {"steps": options.steps}
    warmup = {"warmup_steps": min(recipe.optimizer.warmup_steps, options.steps // 10)}
    recipe = recipe.model_copy(
        update={
            "schedule": recipe.schedule.model_copy(update=fewer),
            "optimizer": recipe.optimizer.model_copy(update=warmup),
            "data": recipe.data.model_copy(update={"evaluation_samples": EVALUATION_SAMPLES}),
        }
    )
    offered = alternatives(recipe)
    own = next(name for name, each in offered.items() if each == recipe)
    names = options.schedules or list(dict.fromkeys(["full", own]))
    predicted: dict[str, list[float]] = {name: [] for name in names}
    measured: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        for index, name in enumerate(names):
            path = out / f"{index}.yaml"
            path.write_text(yaml.safe_dump(offered[name].model_dump(mode="json")))
            plan = make_plan(offered[name], read_engine_config(recipe.engine))
            probing = probes(plan)
            costs = fit(probing, medians(time_stages_here(probing, options.shards, options.workers)))
            predicted[name].append(plan_total(costs, plan))
            measured[name].append(train(path, options.shards, RunDir(out / f"{index}-{number}"), options.workers))
    rows, holds = [], True
    full_s = statistics.median(measured[names[0]])
    for name in names:
        expected_s, taken_s = statistics.median(predicted[name]), statistics.median(measured[name])
        off = expected_s / taken_s - 1
        holds = holds and abs(off) <= MAX_OFF
        shown = (_with_range(measured[name]), _with_range(predicted[name]))
        by_round = [full / taken for full, taken in zip(measured[names[0]], measured[name], strict=True)]
        times = f"{full_s / taken_s:.2f} ({min(by_round):.2f} to {max(by_round):.2f} by round)"
        rows.append([name, *shown, f"{off:+.1%}", times])
    columns = ["schedule", "training, s", "predicted, s", "off", f"speed beside {names[0]}"]
    note = f"{shape(plan, options.workers)} {options.steps} steps, medians of {options.rounds} rounds (least to most)."
    verdict = f"- {'held' if holds else 'MISSED'}: predictions within {MAX_OFF:.0%} of the runs"
    head = heading("Schedules end to end", this_command(), provenance(), hardware())
    write_record(options.record, [*head, note, "", *table(columns, rows), "", verdict])
    sys.exit(0 if holds else 1)


def _with_range(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


def train(recipe: Path, shards: Path, run: RunDir, num_workers: int) -> float:
    """Seconds of training of a whole run."""
    command = [sys.executable, "-m", "mslt.cli.main", "train", str(recipe), "--shards", str(shards)]
    subprocess.run([*command, "--run-dir", str(run.path), "--workers", str(num_workers)], check=True)
    return sum(summary["spent_s"]["train"] for summary in read_summaries(run))


if __name__ == "__main__":
    main()
