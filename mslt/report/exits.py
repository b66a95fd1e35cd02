"""Table 1 and Figures 2 to 6 of Xin et al. 2020 (arXiv:2004.12993) for any models and tasks: PNG, CSV and JSON.

What goes in is what `mslt exit sweep` and `mslt exit bench` find. Layers count from 0, the last exit is the whole
model. Our thresholds are chosen on the rows that they are reported on, and every table and figure of them says so;
the paper chose on validation and reports test. `mslt exit calibrate` judges by other rows than it chooses on.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from mslt.evaluate.exit_sweep import best_within
from mslt.evaluate.glue_tasks import PRESETS, TASKS
from mslt.files import whole_file, write_json
from mslt.report import paper

Sweep = dict[str, Any]
Row = dict[str, Any]
SAME = "the same rows"
DROPS = (0.5, 3.0)  # points: the paper's first threshold loses less, its last 2 to 4
LINES = {"entropy": {"marker": "o", "markersize": 2.5, "linewidth": 1.3}, "patience": {"marker": "s", "markersize": 4,
                                                                                       "linestyle": ":"}}  # fmt: skip


def write_report(sweeps: Sequence[Sweep], benches: Sequence[dict[str, Any]], out: Path) -> list[str]:
    """Write all that the data is there for into `out`; the names of the files without their endings."""
    out.mkdir(parents=True, exist_ok=True)
    written: list[tuple[str, list[Row], Any]] = [
        ("table-1", table_rows(sweeps), _draw_table),
        ("figure-2", curve_rows(sweeps), lambda _: _draw_curves(sweeps)),
        ("figure-4", alone_rows(sweeps), lambda _: _draw_alone(sweeps)),
        ("figure-5", [*curve_rows(sweeps), *alone_rows(sweeps)], lambda _: _draw_both(sweeps)),
        ("figure-6", histogram_rows(sweeps), lambda _: _draw_histograms(sweeps)),
    ]
    if benches:
        written.insert(2, ("figure-3", saving_rows(benches), lambda _: _draw_savings(benches)))
    for name, rows, draw in written:
        write_json(out / f"{name}.json", rows)
        _write_csv(out / f"{name}.csv", rows)
        figure = draw(rows)
        with whole_file(out / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=130, format="png", bbox_inches="tight")
        pyplot.close(figure)
    return [name for name, _, _ in written]


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def data_of(found: dict[str, Any]) -> str:
    """What a sweep or a bench is of: the task, of MNLI's validation splits which."""
    task = TASKS[found["task"]]
    return dict(zip(task.validation, task.zip_names, strict=False)).get(found["settings"]["split"], task.name)


def points_of(sweep: Sweep) -> list[Row]:
    """By entropy; of a regression by patience."""
    return sweep["points"]["entropy"] or sweep["points"]["patience"]


def rule_of(point: Row) -> str:
    if "patience" in point:
        return f"patience {point['patience']}" + ("" if point["tolerance"] is None else f" ± {point['tolerance']:g}")
    return "S = " + ", ".join(f"{s:.3g}" for s in point["thresholds"])


def drop_of(sweep: Sweep, point: Row) -> float:
    """Points lost."""
    return 100 * (sweep["full"][sweep["metric"]] - point["scores"][sweep["metric"]])


def _change(sweep: Sweep, point: Row) -> float:
    return 0.0 - drop_of(sweep, point)  # nothing lost is no -0.0


def chosen(sweep: Sweep) -> list[Row]:
    """As the paper chooses its thresholds: the most saving with less than 0.5 points lost, one at 2 to 4, and one
    between; fewer where they are the same."""
    points = sorted(points_of(sweep), key=lambda point: point["saving"])
    found_of = [(p, p["saving"], drop_of(sweep, p)) for p in points]
    first, last = (best_within(found_of, drop) or points[0] for drop in DROPS)
    middle = (first["saving"] + last["saving"]) / 2
    between = min(points, key=lambda p: (abs(p["saving"] - middle), drop_of(sweep, p)))
    found: list[Row] = []
    for point in (first, between, last):
        if point not in found:
            found.append(point)
    return found


def table_rows(sweeps: Sequence[Sweep]) -> list[Row]:
    """Table 1: ours, then the paper's for the same tasks. Scores in percent, drops in points."""
    rows: list[Row] = []
    for sweep in sweeps:
        metric = sweep["metric"]
        base = {
            "model": sweep["exits"],
            "is_ours": True,
            "task": data_of(sweep),
            "metric": metric,
            "split": sweep["settings"]["split"],
            "chosen_on": None,
        }
        rows.append({**base, "method": "whole", "score": 100 * sweep["full"][metric], "saving": 0.0})
        for point in chosen(sweep):
            rows.append({**base, "method": rule_of(point), "score": _change(sweep, point),
                         "saving": 100 * point["saving"], "chosen_on": SAME})  # fmt: skip
    for task in _tasks(sweeps):
        for reported in paper.EARLY_EXIT:
            if task in reported.scores:
                rows.append({"model": f"{reported.model} (Xin et al.)", "is_ours": False, "task": task,
                             "metric": PRESETS["deebert"].headline(task), "split": "test",
                             "method": reported.method, "score": reported.scores[task],
                             "saving": reported.savings.get(task, 0.0),
                             "chosen_on": "validation" if reported.method == "DeeBERT" else None})  # fmt: skip
    return rows


def curve_rows(sweeps: Sequence[Sweep]) -> list[Row]:
    """Figure 2."""
    return [
        {"model": sweep["exits"], "task": data_of(sweep), "by": kind, "rule": rule_of(point),
         "saving": point["saving"], "metric": sweep["metric"], "score": point["scores"][sweep["metric"]]}
        for sweep in sweeps
        for kind, points in sweep["points"].items()
        for point in points
    ]  # fmt: skip


def alone_rows(sweeps: Sequence[Sweep]) -> list[Row]:
    """Figure 4."""
    return [
        {"model": sweep["exits"], "task": data_of(sweep), "exit": k, "metric": sweep["metric"],
         "score": found[sweep["metric"]]}
        for sweep in sweeps
        for k, found in enumerate(sweep["alone"])
    ]  # fmt: skip


def saving_rows(benches: Sequence[dict[str, Any]]) -> list[Row]:
    """Figure 3."""
    return [
        {"model": bench["exits"], "task": data_of(bench), "rows": bench["rows"], "batch_size": bench["batch_size"],
         "check_every": bench["settings"]["check_every"], "rule": rule_of(rule),
         "expected_saving": rule["expected_saving"], "measured_saving": rule["measured_saving"],
         "speedup": rule["speedup"]}
        for bench in benches
        for rule in bench["rules"]
    ]  # fmt: skip


def histogram_rows(sweeps: Sequence[Sweep]) -> list[Row]:
    """Figure 6: of the thresholds of Table 1."""
    return [
        {"model": sweep["exits"], "task": data_of(sweep), "rule": rule_of(point), "saving": point["saving"],
         "drop_points": drop_of(sweep, point), "chosen_on": SAME, "exit": k, "rows": rows}
        for sweep in sweeps
        for point in chosen(sweep)
        for k, rows in enumerate(point["num_leaving"])
    ]  # fmt: skip


def lines(sweeps: Sequence[Sweep]) -> list[str]:
    """What a terminal shows."""
    printed = []
    for sweep in sweeps:
        metric = sweep["metric"]
        printed.append(f"{sweep['exits']}: {sweep['task']}, {sweep['rows']:,} rows of {sweep['settings']['split']}, "
                       f"{metric} of the whole model {100 * sweep['full'][metric]:.1f}")  # fmt: skip
        alone = ", ".join(f"{k}: {100 * found[metric]:.1f}" for k, found in enumerate(sweep["alone"]))
        printed.append(f"  each exit alone (from 0): {alone}")
        shown = [*chosen(sweep), *(p for p in sweep["points"]["patience"] if p["saving"])][:12]
        printed.append(f"  rules, the first {len(chosen(sweep))} chosen on {SAME}:")
        for point in shown:
            leaving = " ".join(str(n) for n in point["num_leaving"])
            printed.append(f"  {rule_of(point):>18}: {_change(sweep, point):+5.1f} points, {point['saving']:6.1%} of "
                           f"the layers saved; rows leaving: {leaving}")  # fmt: skip
    return printed


def _panels(count: int, width: float = 4.2, height: float = 3.4) -> tuple[Any, list[Axes]]:
    columns = min(count, 3)
    lines_ = -(-count // columns)
    figure, grid = pyplot.subplots(
        lines_, columns, squeeze=False, figsize=(width * columns + 0.4, height * lines_ + 0.3), layout="constrained"
    )
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    for used in axes[:count]:
        used.grid(alpha=0.25)
    return figure, axes


def _tasks(found: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(data_of(each) for each in found))


def _names(sweeps: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What a legend says of each folder: the end of its path."""
    return {sweep["exits"]: "/".join(Path(sweep["exits"]).parts[-2:]) for sweep in sweeps}


def _draw_curves(sweeps: Sequence[Sweep]) -> Any:
    figure, grid = _panels(len(_tasks(sweeps)))
    for axes, task in zip(grid, _tasks(sweeps), strict=False):
        _curves(axes, [sweep for sweep in sweeps if data_of(sweep) == task])
        axes.set_title(task, fontsize=10)
    figure.suptitle("quality beside the share of layers saved; ● whole model", fontsize=10)
    return figure


def _curves(axes: Axes, sweeps: Sequence[Sweep]) -> None:
    names = _names(sweeps)
    for index, sweep in enumerate(sweeps):
        metric, color = sweep["metric"], f"C{index}"
        for kind, style in LINES.items():
            points = sorted(sweep["points"][kind], key=lambda p: p["saving"])
            points = points if kind == "entropy" else [p for p in points if p["tolerance"] == points[0]["tolerance"]]
            if points:
                axes.plot([100 * p["saving"] for p in points], [100 * p["scores"][metric] for p in points],
                          color=color, label=f"{names[sweep['exits']]}, {kind}", **style)  # type: ignore[arg-type] # fmt: skip
        axes.plot([0], [100 * sweep["full"][metric]], "o", color=color, markersize=7)
    axes.set_xlabel("expected saving, % of layers", fontsize=9)
    axes.set_ylabel(f"{sweeps[0]['metric']}, %", fontsize=9)
    axes.legend(fontsize=7)


def _draw_alone(sweeps: Sequence[Sweep]) -> Any:
    figure, grid = _panels(len(_tasks(sweeps)))
    for axes, task in zip(grid, _tasks(sweeps), strict=False):
        _alone(axes, [sweep for sweep in sweeps if data_of(sweep) == task])
        axes.set_title(task, fontsize=10)
    figure.suptitle("quality where all rows leave at one exit", fontsize=10)
    return figure


def _alone(axes: Axes, sweeps: Sequence[Sweep]) -> None:
    names = _names(sweeps)
    for index, sweep in enumerate(sweeps):
        found = [100 * each[sweep["metric"]] for each in sweep["alone"]]
        axes.plot(range(len(found)), found, "o-", color=f"C{index}", markersize=4, label=names[sweep["exits"]])
    longest = max(sweep["num_exits"] for sweep in sweeps)
    axes.set_xticks(range(0, longest, 1 if longest <= 12 else 2))
    axes.set_xlabel("exit behind layer, from 0", fontsize=9)
    axes.set_ylabel(f"{sweeps[0]['metric']}, %", fontsize=9)
    axes.legend(fontsize=7)


def _draw_both(sweeps: Sequence[Sweep]) -> Any:
    figure, grid = pyplot.subplots(
        len(sweeps), 2, squeeze=False, figsize=(9.0, 3.3 * len(sweeps) + 0.3), layout="constrained"
    )
    names = _names(sweeps)
    for (left, right), sweep in zip(grid, sweeps, strict=True):
        _curves(left, [sweep])
        _alone(right, [sweep])
        for axes in (left, right):
            axes.grid(alpha=0.25)
            axes.set_title(f"{names[sweep['exits']]}, {data_of(sweep)}, {sweep['num_exits']} layers", fontsize=9)
    return figure


def _draw_savings(benches: Sequence[dict[str, Any]]) -> Any:
    figure, grid = _panels(len(_tasks(benches)))
    names = _names(benches)
    for axes, task in zip(grid, _tasks(benches), strict=False):
        most = 0.0
        for index, bench in enumerate(b for b in benches if data_of(b) == task):
            rules = sorted(bench["rules"], key=lambda rule: rule["expected_saving"])
            expected = [100 * rule["expected_saving"] for rule in rules]
            axes.plot(expected, [100 * rule["measured_saving"] for rule in rules], "o-", color=f"C{index}",
                      markersize=4, label=f"{names[bench['exits']]}, {bench['rows']:,} rows, batch "
                      f"{bench['batch_size']}, asked every {bench['settings']['check_every']}")  # fmt: skip
            most = max(most, *expected)
        axes.plot([0, most], [0, most], color="grey", linewidth=0.8, linestyle="--", label="as expected")
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("expected saving, % of layers", fontsize=9)
        axes.set_ylabel("measured saving, % of time", fontsize=9)
        axes.legend(fontsize=7)
    return figure


def _draw_histograms(sweeps: Sequence[Sweep]) -> Any:
    columns = max(len(chosen(sweep)) for sweep in sweeps)
    figure, grid = pyplot.subplots(
        len(sweeps), columns, squeeze=False, figsize=(3.3 * columns + 0.4, 2.7 * len(sweeps) + 0.3),
        layout="constrained", sharey="row",
    )  # fmt: skip
    names = _names(sweeps)
    for row, sweep in zip(grid, sweeps, strict=True):
        points = chosen(sweep)
        for axes in row[len(points) :]:
            axes.set_visible(False)
        for axes, point in zip(row, points, strict=False):
            shares = [100 * rows / sweep["rows"] for rows in point["num_leaving"]]
            axes.bar(range(len(shares)), shares, width=0.8)
            axes.set_title(f"{rule_of(point)}: {point['saving']:.0%} saved, {_change(sweep, point):+.1f} points",
                           fontsize=8)  # fmt: skip
            axes.set_xticks(range(0, len(shares), 1 if len(shares) <= 12 else 2))
            axes.set_xlabel("layer that rows leave behind, from 0", fontsize=8)
        row[0].set_ylabel(f"{names[sweep['exits']]}\n{data_of(sweep)}, % of rows", fontsize=8)
    figure.suptitle(f"where rows leave; thresholds chosen on {SAME}", fontsize=9)
    return figure


def _draw_table(rows: Sequence[Row]) -> Any:
    """The table as a picture: a row for each model and method, a pair of columns for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells: dict[tuple[str, str, int], dict[str, str]] = {}
    seen: dict[tuple[str, str], int] = {}
    for row in rows:
        is_whole, ours = row["method"] == "whole", row["is_ours"]
        name = "/".join(Path(row["model"]).parts[-2:]) if ours else row["model"]
        key = (row["model"], row["task"])
        seen[key] = seen.get(key, -1) + 1
        method = row["method"] if not ours or is_whole else "exit"
        text = f"{row['score']:.1f}" if is_whole else f"{row['score']:+.1f}  -{row['saving']:.0f}%"
        detail = f"  ({row['method']})" if ours and not is_whole else ""
        cells.setdefault((name, method, seen[key]), {})[row["task"]] = text + detail
    body = [[name, method, *(found.get(task, "") for task in tasks)] for (name, method, _), found in cells.items()]
    width = 4.2 + 2.3 * len(tasks)
    figure, axes = pyplot.subplots(figsize=(width, 0.26 * (len(body) + 1) + 0.5), layout="constrained")
    axes.axis("off")
    shares = [2.6 / width, 1.1 / width, *[2.2 / width] * len(tasks)]
    table = axes.table(
        body, colLabels=["model", "method", *tasks], colWidths=shares, loc="upper center", cellLoc="left"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7.5)
    splits = ", ".join(dict.fromkeys(row["split"] for row in rows if row["is_ours"]))
    axes.set_title(f"score, or points lost and the share saved: ours of layers, {splits}, thresholds chosen on {SAME}; "
                   "Xin et al. of time, test", fontsize=8)  # fmt: skip
    return figure
