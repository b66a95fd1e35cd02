"""The charts of the report, as Vega-Lite through Altair: each takes runs and gives a specification that draws itself in
a browser, with values under the pointer.

Stages and layers in charts are named as everywhere: stages from 1, layers from 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import altair

from mslt.cost import PARTS, StepCosts, operations, scaled, stage_cost, step_parts, step_total
from mslt.plan import HEAD_SLOTS, Plan, Stage, all_slots, trainable_in_words
from mslt.report.heatmap import HeatMap

MOST_POINTS = 1500  # of a curve: more than a page is wide
BAND_PX = 14  # of a run's row of stages at the bottom of a chart of losses
HEIGHT_PX = 320
CELL_PX = 40  # of a heat map: room for a number
# Okabe and Ito's colours, which the colour-blind tell apart, on white and on black.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")

Spec = dict[str, Any]  # of Vega-Lite, or a row of its data


@dataclass(frozen=True)
class Curves:
    """What charts need of a run: its metrics, its starts, and the summaries of its finished stages."""

    label: str
    plan: Plan
    records: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    summaries: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    @property
    def seconds(self) -> dict[int, float]:
        """Seconds of training after each step that was logged."""
        return {0: 0.0} | {record["step"]: record["train_s"] for record in self.of("train")}


def plan_chart(run: Curves) -> Spec:
    """A column a stage, a row a slot: what trains, what is frozen, and which layer of the stage before it copies."""
    depth = max(stage.depth for stage in run.plan.stages)
    rows = [
        {
            "stage": f"stage {number}",
            "part": slot.replace("layer.", "layer "),
            "state": "trains" if slot in stage.trainable else "frozen",
            "source": _source(stage, slot, number == 1),
            "steps": stage.steps,
        }
        for number, stage in enumerate(run.plan.stages, 1)
        for slot in all_slots(stage.depth)
    ]
    order = [*reversed(HEAD_SLOTS), *(f"layer {index}" for index in reversed(range(depth))), "embeddings"]
    base = altair.Chart(altair.Data(values=rows)).encode(
        x=altair.X("stage:N", title=None, axis=altair.Axis(labelAngle=0, orient="top")),
        y=altair.Y("part:N", title=None, sort=order),
        tooltip=["stage:N", "part:N", "state:N", altair.Tooltip("source:N", title="from"), "steps:Q"],
    )
    cells = base.mark_rect(stroke="white", strokeWidth=1.5, cornerRadius=3).encode(
        color=altair.Color(
            "state:N", title=None, scale=altair.Scale(domain=["trains", "frozen"], range=["#e69f00", "#9fb8cc"]),
            legend=altair.Legend(orient="top"),
        )
    )  # fmt: skip
    texts = base.mark_text(fontSize=10, color="#1a1a1a", aria=False).encode(text="source:N")
    return _spec(cells + texts, 18 * (depth + 4))


def _source(stage: Stage, slot: str, is_first: bool) -> str:
    if not slot.startswith("layer."):
        return "new" if is_first else "kept"
    index = int(slot.split(".")[1])
    source = stage.sources[index]
    return "new" if source == "random" else "kept" if source == index else f"copy of {source}"


def loss_chart(runs: Sequence[Curves], over: Literal["steps", "time"]) -> Spec:
    """MLM loss over steps, or over time of training: held-out with points, in training thin; a row of stages for each
    run below, and a dashed line where a run went on after a stop."""
    longest_s = max(max(run.seconds.values()) for run in runs)
    unit_s, unit = (3600, "hours") if longest_s > 7200 else (60, "minutes")
    name = "steps" if over == "steps" else f"{unit} of training"
    position = {run.label: float if over == "steps" else _time_at(run, unit_s) for run in runs}
    heldout: list[Spec] = []
    training: list[Spec] = []
    bands: list[Spec] = []
    restarts: list[Spec] = []
    for number, run in enumerate(runs):
        at = position[run.label]
        for kind, rows in (("evaluation", heldout), ("train", training)):
            rows += [
                {"run": run.label, "x": at(record["step"]), "loss": record["mlm_loss"], "stage": record["stage"]}
                for record in thinned(run.of(kind))
                if "mlm_loss" in record
            ]
        last = max((record["step"] for record in run.records), default=0)
        borders = [run.plan.first_step(index) for index in range(len(run.plan.stages))] + [run.plan.steps]
        for index, (start, end) in enumerate(pairwise(borders)):
            if start < last:
                stage = run.plan.stages[index]
                bands.append(
                    {
                        "run": run.label, "start": at(start), "end": at(min(end, last)), "row": number,
                        "stage": index + 1, "layers": stage.depth, "trains": trainable_in_words(stage),
                        "shade": 0.75 if index % 2 else 0.45, "text": str(stage.depth),
                        "middle": (at(start) + at(min(end, last))) / 2,
                    }
                )  # fmt: skip
        restarts += [
            {"run": run.label, "x": at(start["step"]), "steps_again": start["steps_again"], "workers": start["workers"]}
            for start in resumed(run)
        ]
    height = HEIGHT_PX + BAND_PX * len(runs)
    x = altair.X("x:Q", title=name, scale=altair.Scale(nice=False))
    settled = [row["loss"] for run in runs for row in _settled([r for r in heldout if r["run"] == run.label])]
    low, high = (min(settled), max(settled)) if settled else (0.0, 1.0)
    room = 0.05 * (high - low) or 0.1
    bottom = low - room - (high - low + 2 * room) * BAND_PX * len(runs) / HEIGHT_PX
    y = altair.Y("loss:Q", title="MLM loss, nats", scale=altair.Scale(domain=[bottom, high + 2 * room], zero=False))
    color = _color(runs)
    told = [
        "run:N",
        altair.Tooltip("x:Q", title=name, format=",.3~f"),
        altair.Tooltip("loss:Q", format=".4f"),
        "stage:O",
    ]
    layers = [
        altair.Chart(altair.Data(values=training)).mark_line(
            opacity=0.4, strokeWidth=1, clip=True, point=altair.OverlayMarkDef(opacity=0, size=40)
        ).encode(x=x, y=y, color=color, tooltip=told),
        altair.Chart(altair.Data(values=heldout)).mark_line(
            strokeWidth=2, clip=True, point=altair.OverlayMarkDef(size=30)
        ).encode(x=x, y=y, color=color, tooltip=told),
    ]  # fmt: skip
    for number in range(len(runs)):
        top = height - BAND_PX * (len(runs) - number)
        own = altair.Chart(altair.Data(values=[band for band in bands if band["row"] == number]))
        layers.append(
            own.mark_rect().encode(
                x=altair.X("start:Q", title=name), x2="end:Q", y=altair.value(top), y2=altair.value(top + BAND_PX - 2),
                color=color, opacity=altair.Opacity("shade:Q", scale=None),
                tooltip=["run:N", "stage:O", "layers:Q", "trains:N"],
            )
        )  # fmt: skip
        layers.append(
            own.mark_text(fontSize=9, baseline="middle", clip=True, aria=False).encode(
                x="middle:Q", y=altair.value(top + BAND_PX / 2 - 1), text="text:N"
            )
        )
    if restarts:
        layers.append(
            altair.Chart(altair.Data(values=restarts)).mark_rule(strokeDash=[4, 3], strokeWidth=1.5).encode(
                x="x:Q", color=color,
                tooltip=["run:N", altair.Tooltip("x:Q", title=f"went on at, {name}", format=",.3~f"),
                         altair.Tooltip("steps_again:Q", title="steps taken again"), "workers:Q"],
            )
        )  # fmt: skip
    return _spec(altair.layer(*layers), height)


def resumed(run: Curves) -> list[dict[str, Any]]:
    """The starts that went on with what had been begun."""
    firsts = {run.plan.first_step(index) for index in range(len(run.plan.stages))}
    return [start for start in run.starts if start["step"] not in firsts or start["steps_again"]]


def _settled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The later four fifths: the first fall would hide all that follows."""
    return rows[len(rows) // 5 :]


def _time_at(run: Curves, unit_s: int) -> Callable[[int], float]:
    """The time of training at a step, on a line between those that were logged."""
    known = sorted(run.seconds.items())

    def at(step: int) -> float:
        for (before, earlier), (after, later) in pairwise(known):
            if before <= step <= after:
                return (earlier + (later - earlier) * (step - before) / max(after - before, 1)) / unit_s
        return known[-1][1] / unit_s

    return at


def time_chart(runs: Sequence[Curves]) -> Spec:
    """Milliseconds of a step by part, a bar for each finished stage, and what is foretold of it."""
    rows, foretold = [], []
    for run in runs:
        for summary in run.summaries:
            name = _stage_name(run, summary["stage"] - 1)
            spent = {part: 1000 * summary["spent_s"].get(part, 0.0) / summary["steps"] for part in PARTS}
            spent["rest"] = max(1000 * summary["spent_s"]["train"] / summary["steps"] - sum(spent.values()), 0.0)
            rows += [
                {"stage": name, "part": part, "order": order, "ms": value, "run": run.label}
                for order, (part, value) in enumerate(spent.items())
            ]
        foretold += [
            {"stage": _stage_name(run, index), "ms": 1000 * sum(parts.values()), "run": run.label}
            for index, parts in predicted(run).items()
        ]
    order = list(dict.fromkeys(row["stage"] for row in rows))
    y = altair.Y("stage:N", title=None, sort=order, axis=altair.Axis(labelLimit=260))
    bars = altair.Chart(altair.Data(values=rows)).mark_bar().encode(
        y=y, x=altair.X("ms:Q", title="ms a step", stack=True), order="order:Q",
        color=altair.Color(
            "part:N", title=None, sort=[*PARTS, "rest"], legend=altair.Legend(orient="top", columns=3),
            scale=altair.Scale(domain=[*PARTS, "rest"], range=[*COLORS[:5], COLORS[6]]),
        ),
        tooltip=["stage:N", "part:N", altair.Tooltip("ms:Q", format=",.1f")],
    )  # fmt: skip
    marks = altair.Chart(altair.Data(values=foretold)).mark_point(
        shape="diamond", size=70, filled=True, fill="white", stroke="black", strokeWidth=1.5, opacity=1
    ).encode(
        y=y, x="ms:Q", tooltip=["stage:N", altair.Tooltip("ms:Q", title="foretold, ms", format=",.1f")]
    )  # fmt: skip
    return _spec(bars + marks if foretold else bars, 26 * max(len(order), 1))


def predicted(run: Curves) -> dict[int, dict[str, float]]:
    """By stage index, seconds of the parts of a step: floating-point operations and trainable parameters, at the rates
    that the finished stage with the most of them reached (mslt.cost). That stage itself is left out."""
    done = {summary["stage"] - 1: summary for summary in run.summaries}
    if len(done) < 2:
        return {}
    stages, model = run.plan.stages, run.plan.model
    parameters = {index: stage_cost(model, stages[index]).trainable_parameters for index in done}
    reference = max(done, key=lambda index: step_total(_operations(run.plan, stages[index]), model, stages[index]))
    stage, spent = stages[reference], done[reference]["spent_s"]
    step_s = {part: spent.get(part, 0.0) / done[reference]["steps"] for part in PARTS}
    work = _operations(run.plan, stage)
    needed = step_parts(work, model, stage)
    if not (step_s["forward"] and step_s["backward"]):  # nobody timed them
        return {}
    costs = {
        name: value * step_s[part] / needed[part]
        for part in ("forward", "backward")
        for name, value in vars(work).items()
        if part in name
    }
    costs |= {
        "reduce_parameter": step_s["reduce"] / parameters[reference],
        "optimizer_parameter": step_s["optimizer"] / parameters[reference],
        "data": step_s["data"],
    }
    foretold = StepCosts(**costs)
    return {index: step_parts(foretold, model, stages[index]) for index in done if index != reference}


def _operations(plan: Plan, stage: Stage) -> StepCosts:
    """Of one worker's samples of a step, up to a factor that all stages share."""
    return scaled(operations(plan.model, stage.sequence_length, plan.data.max_predictions), stage.batch_size)


def _stage_name(run: Curves, index: int) -> str:
    stage = run.plan.stages[index]
    return f"{run.label}, {index + 1}: {stage.depth} layers" + (", top trains" if stage.frozen else "")


def rate_chart(runs: Sequence[Curves]) -> Spec:
    """The learning rate over steps."""
    rows = [
        {"run": run.label, "step": record["step"], "rate": record["learning_rate"]}
        for run in runs
        for record in thinned(run.of("train"))
    ]
    lines = altair.Chart(altair.Data(values=rows)).mark_line(point=altair.OverlayMarkDef(opacity=0, size=40)).encode(
        x=altair.X("step:Q", title="steps"), y=altair.Y("rate:Q", title="learning rate", axis=altair.Axis(format="~g")),
        color=_color(runs), tooltip=["run:N", "step:Q", altair.Tooltip("rate:Q", format=".3~g")],
    )  # fmt: skip
    return _spec(lines, HEIGHT_PX // 2)


def trust_chart(runs: Sequence[Curves]) -> Spec | None:
    """LAMB's trust ratios over steps: the median, and from lowest to highest as a band; None where none were logged."""
    rows = [
        {"run": run.label, "step": record["step"]}
        | {which: record[f"trust_ratio_{which}"] for which in ("min", "median", "max")}
        for run in runs
        for record in thinned([each for each in run.of("train") if each.get("trust_ratio_min", 0.0) > 0.0])
    ]
    if not rows:
        return None
    base = altair.Chart(altair.Data(values=rows)).encode(x=altair.X("step:Q", title="steps"), color=_color(runs))
    y = altair.Scale(type="log")
    told = ["run:N", "step:Q", *(altair.Tooltip(f"{which}:Q", format=".3~g") for which in ("min", "median", "max"))]
    band = base.mark_area(opacity=0.2).encode(y=altair.Y("min:Q", title="trust ratio", scale=y), y2="max:Q")
    line = base.mark_line(point=altair.OverlayMarkDef(opacity=0, size=40)).encode(
        y=altair.Y("median:Q", scale=y), tooltip=told
    )
    return _spec(band + line, HEIGHT_PX // 2)


def heatmap_chart(drawn: HeatMap) -> Spec:
    """The values of a heat map in its cells; colours part at 0 where some are negative."""
    rows: list[Spec] = [
        {"row": row, "column": column, "value": value}
        for row, line in zip(drawn.rows, drawn.values, strict=True)
        for column, value in zip(drawn.columns, line, strict=True)
        if math.isfinite(value)
    ]
    most = max((abs(row["value"]) for row in rows), default=1.0) or 1.0
    differs = any(row["value"] < 0 for row in rows)
    scale = (
        altair.Scale(domain=[-most, 0, most], range=["#f4a582", "#f7f7f7", "#92c5de"])
        if differs
        else altair.Scale(zero=False, range=["#f7fbff", "#6baed6"])
    )
    base = altair.Chart(altair.Data(values=rows)).encode(
        x=altair.X("column:N", title=None, sort=list(drawn.columns), axis=altair.Axis(labelAngle=0, orient="top")),
        y=altair.Y("row:N", title=None, sort=list(drawn.rows), axis=altair.Axis(labelLimit=260)),
        tooltip=["row:N", "column:N", altair.Tooltip("value:Q", format=",.4~f")],
    )
    cells = base.mark_rect().encode(color=altair.Color("value:Q", title=None, scale=scale))
    texts = base.mark_text(fontSize=10, color="#1a1a1a", aria=False).encode(text=altair.Text("value:Q", format=".1f"))
    return _spec(cells + texts, 22 * len(drawn.rows), altair.Step(CELL_PX))


def thinned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most some MOST_POINTS of them, evenly, the last among them."""
    every = -(-len(records) // MOST_POINTS) or 1
    return [record for index, record in enumerate(records) if (len(records) - 1 - index) % every == 0]


def _color(runs: Sequence[Curves]) -> altair.Color:
    colors = {run.label: COLORS[index % len(COLORS)] for index, run in enumerate(runs)}
    return altair.Color(
        "run:N", title=None, scale=altair.Scale(domain=list(colors), range=list(colors.values())),
        legend=altair.Legend(orient="top", labelLimit=400),
    )  # fmt: skip


def _spec(chart: Any, height: int, width: Any = "container") -> Spec:
    """By default as wide as its place on the page; colours of text and lines are left to the page's style."""
    found: Spec = chart.properties(width=width, height=height).to_dict()
    found["background"] = "transparent"
    config = found.setdefault("config", {})
    config["view"] = {"stroke": None}
    config["axisQuantitative"] = {"tickCount": 8, "labelOverlap": "greedy"}
    return found
