"""Tables 1 and 2 and Figure 1 of BERTVision beside ours, and what hidden states are worth. Ours are read from results
that `mslt pool` wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot

from mslt.report import paper
from mslt.report.heatmap import DIFFERENCE, heat_map, limits_of, write_picture


def score_table(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Table 1, header and rows: every method that was searched, then the paper's. In percent, means over seeds."""
    tasks = [result["task"] for result in results]
    methods = list(dict.fromkeys(method for result in results for method in result["methods"]))
    rows = []
    for method in methods:
        cells = []
        for result in results:
            found = result["methods"].get(method)
            cells.append("–" if found is None else _mean(found))
        rows.append([f"{method}, {_budget(results, method)}", *cells])
    for row in paper.POOLING:
        rows.append([f"{row.name} (paper)", *(f"{row.scores[t]:.1f}" if t in row.scores else "–" for t in tasks)])
    return ["", *tasks], rows


def _mean(found: dict[str, Any]) -> str:
    mean = "–" if found["mean"] is None else f"{100 * found['mean']:.1f}"
    spread = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.1f}"
    diverged = found["headlines"].count(None)
    return f"{mean}{spread}{f' ({diverged} diverged)' if diverged else ''}"


def _budget(results: Sequence[dict[str, Any]], method: str) -> str:
    found = [result["methods"][method] for result in results if method in result["methods"]]
    trials = sorted({sum(each["trials"].values()) for each in found})
    seeds = sorted({len(each["headlines"]) for each in found})
    return f"{' or '.join(map(str, trials))} trials, {' or '.join(map(str, seeds))} seeds"


def size_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The four numbers of every task's methods."""
    return [
        [f"{result['task']}, {method}", f"{sizes['head']:,}", f"{sizes['ratio']:,.0f}×",
         f"{sizes['deployed']:,} ({sizes['deployed'] / sizes['whole']:.1%})", f"{sizes['task_bytes'] / 1e6:.2f} MB",
         f"{np.mean(found['train_s']):.1f} s"]
        for result in results
        for method, found in result["methods"].items()
        for sizes in (found["sizes"],)
    ]  # fmt: skip


def compression_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Table 2: how many times smaller what is trained is, and the share of full fine-tuning's scores that it keeps,
    means over the tasks on which both were searched; then the paper's."""
    rows = []
    for method in dict.fromkeys(method for result in results for method in result["methods"]):
        both = [
            result["methods"]
            for result in results
            if {method, "full"} <= result["methods"].keys()
            and None not in (result["methods"][method]["mean"], result["methods"]["full"]["mean"])
        ]
        kept = [each[method]["mean"] / each["full"]["mean"] for each in both if each["full"]["mean"] > 0]
        if kept:
            times = [each[method]["sizes"]["ratio"] for each in both]
            deployed = [each[method]["sizes"]["deployed"] / each[method]["sizes"]["whole"] for each in both]
            rows.append([method, f"{np.mean(times):,.0f}×", f"{np.mean(deployed):.1%}", f"{np.mean(kept):.1%}"])
    return [*rows, *([f"{name} (paper)", f"{times:g}×", "–", f"{share}%"]
                     for name, times, share in paper.COMPRESSION)]  # fmt: skip


def draw_curve(points: Sequence[dict[str, Any]], picture: Path) -> None:
    """Figure 1: the fine-tuned model and heads on its frozen encoder over epochs of fine-tuning, a panel a task."""
    tasks = list(dict.fromkeys(point["task"] for point in points))
    figure, grid = pyplot.subplots(
        1, len(tasks), squeeze=False, figsize=(4.2 * len(tasks) + 0.4, 3.4), layout="constrained"
    )
    for axes, task in zip(grid[0], tasks, strict=True):
        own = sorted((point for point in points if point["task"] == task), key=lambda point: point["epochs"])
        epochs = [point["epochs"] for point in own]
        axes.plot(epochs, [100 * point["whole_headline"] for point in own], "o--", color="black", label="fine-tuned")
        lines: dict[tuple[str, int], dict[float, list[float]]] = {}
        for point in own:
            for head in point["heads"]:
                kind = (head["settings"]["kind"], head["settings"]["adapter_width"])
                lines.setdefault(kind, {}).setdefault(point["epochs"], []).append(100 * head["headline"])
        for index, ((pooler, width), by_epochs) in enumerate(lines.items()):
            means = [float(np.mean(by_epochs[each])) for each in epochs if each in by_epochs]
            axes.plot(list(by_epochs), means, "o-", color=f"C{index}", markersize=4, label=f"{pooler}, A={width}")
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("epochs of fine-tuning before the encoder is frozen", fontsize=9)
        axes.set_ylabel(f"{own[0]['metric']}, %", fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    write_picture(figure, picture)


def draw_importance(found: Sequence[dict[str, Any]], picture: Path) -> None:
    """A row for each head: the points that its score loses without each hidden state, and below them the weights of
    mixes."""
    states = sorted({state for each in found for state in each["importance"]["states"]})
    panels = [("points that the score loses without a hidden state", "drop", True)]
    if any(each["importance"]["weights"] for each in found):
        panels.append(("weights of a mix, %", "weights", False))
    figure, grid = pyplot.subplots(
        len(panels), 1, squeeze=False, layout="constrained",
        figsize=(max(0.55 * len(states) + 2.8, 5.5), (0.38 * len(found) + 1.1) * len(panels)),
    )  # fmt: skip
    for axes, (title, name, is_difference) in zip(grid[:, 0], panels, strict=True):
        shown = [each for each in found if each["importance"][name]]
        values = np.full((len(shown), len(states)), np.nan)
        for row, each in enumerate(shown):
            for state, value in zip(each["importance"]["states"], each["importance"][name], strict=True):
                values[row, states.index(state)] = 100 * value
        rows = [Path(each["folder"]).name for each in shown]
        low, high = limits_of(values, is_difference)
        low = low if is_difference else 0.0
        colours = DIFFERENCE if is_difference else "viridis"
        heat_map(axes, values, rows, [str(state) for state in states], low, high, colours, "{:.1f}")
        axes.set_title(title, fontsize=9)
    grid[-1, 0].set_xlabel("hidden state (0: embeddings)", fontsize=8)
    write_picture(figure, picture)
