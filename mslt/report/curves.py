"""Loss curves of runs, over steps and over training time, with the borders of their stages."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from mslt import metrics
from mslt.files import whole_file
from mslt.rundir import RunDir, read_plan


def draw_curves(runs: list[Path], picture: Path) -> None:
    """Write a PNG: training MLM loss as a thin line, held-out as points, a dotted line where a stage ends."""
    figure, (over_steps, over_time) = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for path, color in zip(runs, pyplot.rcParams["axes.prop_cycle"].by_key()["color"] * len(runs), strict=False):
        run = RunDir(path)
        train = [r for r in metrics.read(run.metrics) if r["kind"] == "train"]
        heldout = [r for r in metrics.read(run.metrics) if r["kind"] == "evaluation"]
        seconds_at = {0: 0.0} | {r["step"]: r["train_s"] for r in train}
        unit_s, unit = (3600.0, "hours") if max(seconds_at.values()) > 7200 else (60.0, "minutes")
        for axes, position in ((over_steps, {s: s for s in seconds_at}), (over_time, seconds_at)):
            scale = 1.0 if axes is over_steps else unit_s
            axes.plot([position[r["step"]] / scale for r in train], [r["mlm_loss"] for r in train],
                      color=color, alpha=0.45, linewidth=1)  # fmt: skip
            axes.plot([position[r["step"]] / scale for r in heldout], [r["mlm_loss"] for r in heldout],
                      color=color, marker="o", markersize=3.5, linewidth=1.6, label=path.name)  # fmt: skip
            plan = read_plan(run)
            for index in range(1, len(plan.stages)):
                border = position.get(plan.first_step(index))
                if border is not None:
                    axes.axvline(border / scale, color=color, linestyle=":", linewidth=1)
        over_time.set_xlabel(f"training time, {unit}")
    over_steps.set_xlabel("steps")
    over_steps.set_ylabel("MLM loss, nats")
    for axes in (over_steps, over_time):
        axes.grid(alpha=0.25)
    over_steps.legend(title="● held-out, thin: training, dotted: stage borders", fontsize=8, title_fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(picture) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)
