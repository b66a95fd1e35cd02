"""Probes of layers side by side: heat maps of accuracies, and of what one checkpoint knows more than another (Figures
1, 2 and 4 of "The convexity of BERT").

Columns are hidden states: 0 the embedding output, k+1 the output of layer k. Percent, and points.
"""

import json
import math
from contextlib import suppress
from itertools import starmap
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
    """The tasks there that were probed as this result was; a file that is no such result is passed over."""

    def how(settings: dict[str, Any]) -> dict[str, Any]:
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
    """Tasks × hidden states, the first minus the second, and what the interval of their paired test rows does not tell
    from 0 in brackets. MsltError where they have other layers, no task in common, or were not probed alike."""
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
    title, names = f"{name} − {base_name}, points", columns(depths.pop())
    if any("text" in base[task]["settings"] for task in tasks):  # of words read back no rows are kept
        return HeatMap(title, tasks, names, values)
    intervals = [
        list(starmap(paired, zip(_right_share(results[task]), _right_share(base[task]), strict=True))) for task in tasks
    ]
    is_unsure = [[low <= 0 <= high for low, high in line] for line in intervals]
    return HeatMap(title, tasks, names, values, intervals, is_unsure)


def _right_share(result: dict[str, Any]) -> np.ndarray:
    """[L, R]: in how many of the repetitions a test row was right, percent."""
    num_rows = result["rows"]["te"]
    return 100 * np.mean([[unpacked(text, num_rows) for text in run["right"]] for run in result["runs"]], 0)


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
