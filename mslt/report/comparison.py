"""Finished runs side by side: a table of what each reached and what it took."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mslt.errors import MsltError
from mslt.plan import Plan
from mslt.rundir import RunDir, read_plan, read_summaries


@dataclass(frozen=True)
class Outcome:
    """One run at its end. `nsp_loss` is None where no next sentences were predicted; `train_s` leaves evaluating and
    saving out; `reduced_bytes` is what one worker handed to the gradient all-reduce; `speedup` is the first run's
    seconds a step over this run's."""

    run: str
    steps: int
    workers: int
    mlm_loss: float
    mlm_accuracy: float
    nsp_loss: float | None
    train_s: float
    speedup: float
    reduced_bytes: int


def differences(runs: list[Path]) -> list[str]:
    """What makes held-out losses of the runs incomparable: a line for each run that reads other samples than the
    first."""
    first, *others = ((path, read_plan(RunDir(path))) for path in runs)
    found = []
    for path, plan in others:
        ours, theirs = (_decides_samples(p) for p in (first[1], plan))
        changed = [f"{name} {ours[name]} → {theirs[name]}" for name in ours if ours[name] != theirs[name]]
        if changed:
            found.append(f"{path} is held out on other samples than {first[0]}: {', '.join(changed)}")
    return found


def _decides_samples(plan: Plan) -> dict[str, Any]:
    data = plan.data.model_dump(exclude={"shards"})
    return {"shards": plan.shards_sha256, "sequence_length": plan.stages[-1].sequence_length, **data}


def outcomes(runs: list[Path]) -> list[Outcome]:
    """The first run is the baseline of the speedups. MsltError for a run that is not finished."""
    rows: list[Outcome] = []
    for path in runs:
        run = RunDir(path)
        unfinished = run.first_unfinished(read_plan(run))
        if unfinished is not None:
            raise MsltError(f"{path}: stage {unfinished + 1} is not done; finish it with `mslt train`")
        summaries = read_summaries(run)
        end, steps = summaries[-1]["evaluation_after"], sum(summary["steps"] for summary in summaries)
        train_s = sum(summary["spent_s"]["train"] for summary in summaries)
        baseline = rows[0] if rows else None
        rows.append(
            Outcome(
                run=str(path),
                steps=steps,
                workers=summaries[-1]["world_size"],
                mlm_loss=end["mlm_loss"],
                mlm_accuracy=end["mlm_accuracy"],
                nsp_loss=end.get("nsp_loss"),
                train_s=train_s,
                speedup=(baseline.train_s / baseline.steps) / (train_s / steps) if baseline else 1.0,
                reduced_bytes=sum(summary["reduced_bytes"] for summary in summaries),
            )
        )
    return rows
