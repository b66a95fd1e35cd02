"""Which growth schedule, and which of its options? A finished study of `mslt compare`, written down.

    mslt compare STUDY --out OUT --shards SHARDS --at-once 2 --workers 1
    python -m benchmarks.schedules STUDY SHARDS OUT [--workers 1] [--picture FILE] [--record FILE]

STUDY is one of benchmarks/recipes/study-*.yaml. Equal time is by the measured times of steps, in
OUT/step-times.json, not by the clock of the runs, so that the machine may do other things beside them.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.record import hardware, heading, shape, table, write_record
from mslt.data.manifest import read_manifest
from mslt.errors import MsltError
from mslt.plan import Plan
from mslt.report.curves import draw_curves
from mslt.report.study import Spread, findings, verdict
from mslt.report.study import table as findings_table
from mslt.rundir import RunDir, read_plan, read_summaries
from mslt.study import Arm, Study, heldout_loss, is_done, open_study, run_study, seeds_of, tuning_arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    study = open_study(options.study, options.out, options.shards, options.workers, not_yet)
    chosen = run_study(study, not_done, 1)
    lines = report(study, chosen, options.shards, options.workers)
    if options.picture is not None:
        first_runs = {name: arms[0].run for name, arms in chosen.items()}
        draw_curves(first_runs, options.picture, study.step_seconds, study.title)
        lines += ["", f"![curves]({options.picture.name})"]
    any_run = next(iter(chosen.values()))[0].run
    provenance = json.loads((any_run / "provenance.json").read_text())
    command = f"mslt compare {options.study} --out OUT --shards SHARDS --workers {options.workers}"
    write_record(options.record, [*heading("Growth schedules compared", command, provenance, hardware()), *lines])


def not_yet(_: Plan) -> list[dict[str, list[float]]]:
    raise MsltError("the study has not been run; start it with `mslt compare` as the docstring says")


def not_done(_: Path, run: Path, __: Path) -> None:
    raise MsltError(f"{run}: is not done; run `mslt compare` as the docstring says")


def report(study: Study, chosen: dict[str, list[Arm]], shards: Path, num_workers: int) -> list[str]:
    config, manifest = study.config, read_manifest(shards)
    any_plan = read_plan(RunDir(next(iter(chosen.values()))[0].run))
    found = findings(study, chosen)
    train, heldout = manifest.splits["train"], manifest.splits["validation"]
    tokens = config.steps * study.base.training.batch_size * study.base.training.sequence_length
    header, *rows = findings_table(found)
    tuning = {name: tuning_arms(study, name) for name in config.schedules}
    rates = sorted({arm.learning_rate for arms in tuning.values() for arm in arms})
    tried = [
        [name, f"{share:g}", *(str(losses[rate]) if rate in losses else "–" for rate in rates)]
        for name, arms in tuning.items() for share, losses in _tried(study, arms).items()
    ]  # fmt: skip
    stages = []
    for name, arms in chosen.items():
        summaries, plan = _stages(arms[0])
        for number, (stage, summary) in enumerate(zip(plan.stages, summaries, strict=True), 1):
            before, after = (summary[f"evaluation_{when}"]["mlm_loss"] for when in ("before", "after"))
            trains = "all" if not stage.frozen else f"top {sum(s.startswith('layer') for s in stage.trainable)}"
            stages.append(
                [f"{name}, {number}", str(stage.depth), trains, f"{stage.steps:,}", f"{before:.3f}", f"{after:.3f}"]
            )
    entropy = manifest.unigram_entropy_nats or float("nan")
    return [
        f"{shape(any_plan, num_workers)} {study.base.optimizer.name}, {config.steps:,} steps of {found[0].name} "
        f"({tokens / 1e6:.1f} M tokens); {len(config.seeds)} seeds, mean ± standard deviation. Text: {train.tokens:,} "
        f"training tokens, held-out {heldout.tokens:,} ({study.base.data.evaluation_samples:,} samples at most, fixed "
        f"masks), unigram entropy {entropy:.3f} nats. Held-out MLM loss in nats at the end of a run.",
        "",
        *table(header, rows),
        "",
        *(f"- {line}" for line in verdict(found)),
        *(f"- {line}" for name, arms in chosen.items() for line in growth_lines(name, arms)),
        f"- The runs are of the commits {', '.join(sorted(_commits([*chosen.values(), *tuning.values()])))}.",
        "",
        "## Learning rates and decay shares, equal time",
        "",
        f"With a deviation over seeds {', '.join(map(str, config.seeds))}, else of seed {config.seeds[0]} alone: what "
        "leads gets the others, and is chosen once it leads with all.",
        "",
        *table(["schedule", "decay share", *(f"{rate:g}" for rate in rates)], tried),
        "",
        f"## Stages, equal time, seed {config.seeds[0]}",
        "",
        *table(["schedule, stage", "layers", "trains", "steps", "MLM before", "MLM after"], stages),
    ]


def _tried(study: Study, arms: list[Arm]) -> dict[float, dict[float, Spread]]:
    """Held-out loss by decay share and rate."""
    found: dict[float, dict[float, Spread]] = {}
    for arm in arms:
        losses = tuple(heldout_loss(each) for each in seeds_of(study, arm) if is_done(each))
        found.setdefault(study.recipe(arm).optimizer.decay_share, {})[arm.learning_rate] = Spread(losses)
    return found


def growth_lines(name: str, arms: list[Arm]) -> list[str]:
    """Over all seeds at equal time: how far growing throws the loss back, and whether every stage lowers it."""
    jumps, gains = [], []
    for arm in arms:
        if arm.equal != "time" or heldout_loss(arm) == math.inf:
            continue
        mlm = [
            [summary[f"evaluation_{when}"]["mlm_loss"] for when in ("before", "after")] for summary in _stages(arm)[0]
        ]
        jumps += [after_growth - before for (_, before), (after_growth, _) in pairwise(mlm)]
        gains += [before - after for before, after in mlm]
    if not jumps:
        return []
    lowers = "every stage lowers the loss" if min(gains) > 0 else f"a stage raises the loss by {-min(gains):.3f}"
    jumped = f"{min(jumps):+.3f} to {max(jumps):+.3f} nats"
    return [f"{name}, equal time, all seeds: growing changes the loss by {jumped}; {lowers}."]


def _stages(arm: Arm) -> tuple[list[dict[str, Any]], Plan]:
    run = RunDir(arm.run)
    return read_summaries(run), read_plan(run)


def _commits(every: list[list[Arm]]) -> set[str]:
    runs = {arm.run for arms in every for arm in arms}
    return {json.loads((run / "provenance.json").read_text())["commit"] for run in runs}


if __name__ == "__main__":
    main()
