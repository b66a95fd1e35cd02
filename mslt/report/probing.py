"""Probes of layers side by side: heat maps of accuracies, and of what one checkpoint knows more than another (Figures
1, 2 and 4 of "The convexity of BERT").

Columns are hidden states: 0 the embedding output, k+1 the output of layer k. Percent, and points.
"""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mslt.errors import MsltError
from mslt.evaluate.intervals import paired, unpacked
from mslt.report.heatmap import HeatMap

Results = dict[str, dict[str, Any]]  # task → what a probe found


def read_results(folder: Path, command: str, checkpoint: str) -> Results:
    """What lies in a folder of a probe's results. MsltError where there is nothing, and for what is of another
    checkpoint than that of this digest."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
            found[str(result["task"])], probed = result, result["settings"]["checkpoint"]
        except (ValueError, KeyError, TypeError):
            raise MsltError(f"{path}: is no result of a probe; move it away") from None
        if probed != checkpoint:
            raise MsltError(f"{path}: is of another checkpoint, which was there before; move it away, and run "
                            f"{command} again")  # fmt: skip
    if not found:
        raise MsltError(f"{folder}: holds no results; run {command} first")
    return found


def probed_alike(folder: Path, result: dict[str, Any]) -> Results:
    """The tasks there, or dropout ratios, that were probed as this result was; a file that is no such result is passed
    over."""

    def how(settings: dict[str, Any]) -> dict[str, Any]:
        if "text" in settings:
            return {**settings, "dropout": None}
        search = {name: value for name, value in settings["search"].items() if name != "num_hidden"}  # a task's own
        return {**settings, "task": None, "rows": None, "search": search}

    alike, found = how(result["settings"]), {}
    for path in sorted(folder.glob("*.json")):
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            other = json.loads(path.read_text())
            if how(other["settings"]) == alike:
                found[str(other["task"])] = other
    return found


def accuracy_map(title: str, results: Results) -> HeatMap:
    """Tasks × hidden states."""
    depth = max(len(result["accuracy"]) for result in results.values())
    values, intervals = zip(*(_percent(result, depth) for result in results.values()), strict=True)
    return HeatMap(title, list(results), columns(depth), values, intervals)


def difference_map(named: tuple[str, Results], base_named: tuple[str, Results]) -> HeatMap:
    """Tasks × hidden states, the first minus the second, and what their paired interval does not tell from 0 in
    brackets. MsltError where they have other layers, no task in common, or were not probed alike."""
    (name, results), (base_name, base) = named, base_named
    tasks = [task for task in base if task in results]
    if not tasks:
        raise MsltError(f"{name}, {base_name}: have no probed task in common")
    depths = {len(of[task]["accuracy"]) for of in (results, base) for task in tasks}
    if len(depths) > 1:
        raise MsltError(f"{name}, {base_name}: have {' and '.join(map(str, sorted(depths)))} hidden states, so that "
                        "there is no difference; show them by --side-by-side")  # fmt: skip
    for task in tasks:
        refuse_otherwise_probed(task, results[task], base[task], name, base_name)
    values = [
        [100 * (here - there) for here, there in zip(results[task]["accuracy"], base[task]["accuracy"], strict=True)]
        for task in tasks
    ]
    intervals = [difference_intervals(results[task], base[task]) for task in tasks]
    is_unsure = [[low <= 0 <= high for low, high in line] for line in intervals]
    title = f"{name} − {base_name}, points"
    return HeatMap(title, tasks, columns(depths.pop()), values, intervals, is_unsure)


def difference_intervals(result: dict[str, Any], base: dict[str, Any]) -> list[tuple[float, float]]:
    """[L] of the first minus the second, points. MsltError where what is right in them is damaged."""
    (ours_LSU, asked_U), (theirs_LSU, _) = _right(result), _right(base)
    both = (paired(ours_SU, theirs_SU, asked_U) for ours_SU, theirs_SU in zip(ours_LSU, theirs_LSU, strict=True))
    return [(100 * low, 100 * high) for low, high in both]


def _right(result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """How much was right of each unit, [L, S, U], in each of S repetitions, and how much was asked of it [U]: a unit is
    a test row of a task, or a passage whose words are read back."""
    try:
        if "asked" in result:
            return np.array(result["right"])[:, None], np.array(result["asked"])
        num_rows = result["rows"]["te"]
        right_SLU = np.array([[unpacked(text, num_rows) for text in run["right"]] for run in result["runs"]])
        return right_SLU.swapaxes(0, 1), np.ones(num_rows, dtype=int)
    except (ValueError, KeyError, TypeError) as error:
        raise MsltError(f"{result['task']}: which answers of {result['checkpoint']} were right is damaged ({error!r}); "
                        "move its results away, and probe it again") from None  # fmt: skip


def side_by_side(named: dict[str, Results], num_frozen: dict[str, int]) -> list[HeatMap]:
    """A map for each task: checkpoints × hidden states; in brackets the lowest of a checkpoint, which its stage left as
    they were. MsltError where they were not probed alike."""
    tasks = list(dict.fromkeys(task for results in named.values() for task in results))
    maps = []
    for task in tasks:
        having = {name: results[task] for name, results in named.items() if task in results}
        first = next(iter(having))
        for name, result in having.items():
            refuse_otherwise_probed(task, result, having[first], name, first)
        depth = max(len(result["accuracy"]) for result in having.values())
        values, intervals = zip(*(_percent(result, depth) for result in having.values()), strict=True)
        is_frozen = [[k < num_frozen[name] for k in range(depth)] for name in having]
        maps.append(HeatMap(f"{task}, %", list(having), columns(depth), values, intervals, is_frozen))
    return maps


def refuse_otherwise_probed(task: str, one: dict[str, Any], other: dict[str, Any], name: str, other_name: str) -> None:
    """MsltError where results of a task are of other data or another search; of another tokenizer where it is its
    tokens that are read back, and not labels."""
    apart = {"checkpoint"} if "text" in one["settings"] else {"checkpoint", "tokenizer"}
    ours, theirs = (
        {key: value for key, value in result["settings"].items() if key not in apart} for result in (one, other)
    )
    unlike = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if unlike:
        raise MsltError(f"{task}: {name} was probed otherwise than {other_name} ({', '.join(unlike)}); probe both with "
                        "the same options and data")  # fmt: skip


def best_layer(result: dict[str, Any]) -> int:
    """The first hidden state with the best accuracy on the dev rows: on the test rows chance would choose, too."""
    dev = result["dev"]
    return max(range(len(dev)), key=lambda k: dev[k])


def columns(depth: int) -> list[str]:
    """What hidden states are called."""
    return ["emb", *(str(layer) for layer in range(depth - 1))]


def _percent(result: dict[str, Any], depth: int) -> tuple[list[float], list[tuple[float, float]]]:
    """Accuracies and their intervals, NaN above the last layer."""
    found = np.full((3, depth), math.nan)
    for line, name in zip(found, ("accuracy", "low", "high"), strict=True):
        line[: len(result[name])] = 100 * np.array(result[name])
    accuracy, low, high = found.tolist()
    return accuracy, list(zip(low, high, strict=True))
