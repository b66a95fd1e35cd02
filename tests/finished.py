"""Run directories as finished runs leave them, made up: plan, metrics and summaries, no weights."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mslt import metrics
from mslt.files import write_json
from mslt.plan import Plan
from mslt.provenance import provenance
from mslt.rundir import RunDir, open_run
from mslt.schedule import lr_at

REDUCED_BYTES = 1000  # of a step


def write_finished(
    path: Path, plan: Plan, loss_at: Callable[[int], float], step_s: Sequence[float], every: int = 10
) -> Path:
    """A run whose held-out MLM loss after so many steps is `loss_at`. A step of each stage takes `step_s`. Losses are
    logged `every` so many steps, and at the borders of stages."""
    run = open_run(path, plan, "", provenance())
    spent_s = 0.0
    for index, (stage, each_s) in enumerate(zip(plan.stages, step_s, strict=True)):
        first = plan.first_step(index)

        def evaluated(step: int, number: int = index + 1) -> dict[str, float]:
            means = {"mlm_loss": loss_at(step), "mlm_accuracy": 0.25}
            if plan.data.next_sentence_prediction:
                means["nsp_loss"] = 0.5
            metrics.append(run.metrics, {"kind": "evaluation", "stage": number, "step": step, **means})
            return means

        before = means = evaluated(first)
        for done in sorted({*range(every, stage.steps, every), stage.steps}):
            trained = {
                "step": first + done,
                "train_s": spent_s + done * each_s,
                "mlm_loss": loss_at(first + done) + 0.1,
                "learning_rate": lr_at(stage, done - 1),
            }
            metrics.append(run.metrics, {"kind": "train", "stage": index + 1, **trained})
            means = evaluated(first + done)
        spent_s += stage.steps * each_s
        folder = run.stage(index)
        folder.path.mkdir()
        summary = {
            "stage": index + 1,
            "steps": stage.steps,
            "world_size": 2,
            "evaluation_before": before,
            "evaluation_after": means,
            "spent_s": {"train": stage.steps * each_s, "evaluation": 99.0},
            "reduced_bytes": stage.steps * REDUCED_BYTES,
        }
        write_json(folder.summary, summary)
    return path


def unfinish(path: Path, stage_index: int) -> None:
    """Take a stage's DONE marker away."""
    RunDir(path).stage(stage_index).summary.unlink(missing_ok=True)
