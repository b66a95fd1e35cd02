"""Tables 1 and 2 of "The convexity of BERT": surgery on layers and a second objective, fine-tuned, beside plain
fine-tuning. Ours are what `mslt evaluate glue` wrote, or they are not there."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mslt.errors import MsltError
from mslt.evaluate.glue_tasks import PRESETS
from mslt.plan import sources_in_words
from mslt.report import paper

METHODS = tuple(dict.fromkeys(row.method for rows in paper.SURGERY.values() for row in rows))
# Of one checkpoint, which surgery alters: what `objective` of their settings is of, None where there is none.
OBJECTIVES = {"plain": None, "multi-objective": "masked words", "extra-layer": "masked words with an extra layer"}
LABELS = "labels alone"
SURGERIES = ("copy", "drop")  # of what `mslt grow` made of it
VERDICT = "In the paper no method beats plain fine-tuning on the average of the four tasks."


@dataclass(frozen=True)
class Mean:
    """Percent, over the `num_seeds` of the best setting; the deviation of one is not known."""

    value: float
    deviation: float | None = None
    num_seeds: int | None = None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


@dataclass(frozen=True)
class Method:
    """Means by task, and which layers of its parent a grown checkpoint has, in words."""

    means: dict[str, Mean]
    layers: str | None = None


@dataclass(frozen=True)
class SurgeryTable:
    """`rows`: who says so, the method, and means by column; ours first. `columns` ends with the average, which only
    rows with every task have; its deviation is not told."""

    title: str
    columns: list[str]
    rows: list[tuple[str, str, dict[str, Mean]]]


def read_methods(folders: dict[str, Path]) -> dict[str, Method]:
    """MsltError for a folder without results, of other headlines than the paper's, or of another method; and where
    methods were not fine-tuned alike, or not from one checkpoint, which surgery altered."""
    read: dict[str, dict[str, Any]] = {}
    for method, folder in folders.items():
        try:
            results = json.loads((folder / "results.json").read_text())
            settings = results["settings"]
            _ = results["tasks"], settings["checkpoint"], settings["max_train_rows"]
            objective, surgery = _objective(settings), _surgery(results)
        except (OSError, ValueError, KeyError, TypeError):
            raise MsltError(f"{method}={folder}: holds no results.json of `mslt evaluate glue`; run it first, with "
                            "--preset convexity") from None  # fmt: skip
        wanted = OBJECTIVES.get(method)
        if objective != wanted:
            raise MsltError(f"{method}={folder}: was fine-tuned on {objective or LABELS}, not on {wanted or LABELS}; "
                            "name the folder of this method's")  # fmt: skip
        if method in SURGERIES and surgery != method:
            is_of = f"one with a {surgery}" if surgery else "none of which it is told what `mslt grow` did to it"
            raise MsltError(f"{method}={folder}: is not of a checkpoint with a {method}, but {is_of}; fine-tune what "
                            "`mslt grow` writes today")  # fmt: skip
        read[method] = results
    _refuse_unlike(folders, read)
    found: dict[str, Method] = {}
    done: dict[str, tuple[str, Any]] = {}
    for method, results in read.items():
        means = {}
        for task in paper.SURGERY_TASKS:
            entry = results["tasks"].get(task)
            if entry is None or entry["best"] is None:
                continue
            headline = PRESETS["convexity"].headline(task)
            if entry["headline"] != headline:
                raise MsltError(f"{method}={folders[method]}: {task} is headed by {entry['headline']}, in the paper by "
                                f"{headline}; fine-tune with --preset convexity")  # fmt: skip
            how = entry["protocol"], results["settings"]["max_train_rows"]
            first, as_first = done.setdefault(task, (method, how))
            if how != as_first:
                raise MsltError(f"{method}={folders[method]}: {task} was fine-tuned otherwise than {first}'s; give "
                                "`mslt evaluate glue` the same options for all")  # fmt: skip
            deviation = None if entry["deviation"] is None else 100 * entry["deviation"]
            means[task] = Mean(100 * entry["mean"], deviation, len(entry["headlines"]))
        layers = sources_in_words(tuple(results["grown"]["layers"])) if method in SURGERIES else None
        found[method] = Method(means, layers)
    return found


def _refuse_unlike(folders: dict[str, Path], read: dict[str, dict[str, Any]]) -> None:
    """MsltError where methods begin from unlike checkpoints, or second objectives differ in more than the layer."""
    begun: dict[str, Any] = {}  # method → the digest of what surgery altered, or of the checkpoint as it is
    masked: dict[str, Any] = {}
    for method, results in read.items():
        first, each = next(iter(begun), method), results["settings"]
        begun[method] = results["grown"]["parent"] if method in SURGERIES else each["checkpoint"]
        if begun[method] != begun[first]:
            raise MsltError(f"{method}={folders[method]}: begins from another checkpoint than {first}'s; begin all "
                            "from one folder (its name on the hub is another), or what `mslt grow` made")  # fmt: skip
        if each.get("objective") is not None:
            first = next(iter(masked), method)
            masked[method] = {**each["objective"], "extra_layer": None}
            if masked[method] != masked[first]:
                raise MsltError(f"{method}={folders[method]}: has its words masked or its MLM head begun otherwise "
                                f"than {first}'s; give both the same options")  # fmt: skip


def surgery_tables(ours: dict[str, Method]) -> list[SurgeryTable]:
    """Of each the paper's rows, and before them ours of the same methods. Plain fine-tuning stands in both, ours only
    beside another of its table, or in the first where it is alone: the second's is another model."""
    tables = []
    for index, (title, reported) in enumerate(paper.SURGERY.items()):
        beside = {row.method for row in reported} & (ours.keys() - {"plain"})
        mine = reported if beside or (index == 0 and ours.keys() == {"plain"}) else ()
        done = [(row, ours[row.method]) for row in mine if row.method in ours]
        rows = [("ours", _name(row, method), method.means) for row, method in done if method.means]
        rows += [("paper", row.name, {task: Mean(score) for task, score in row.scores.items()}) for row in reported]
        tables.append(
            SurgeryTable(
                title,
                [*paper.SURGERY_TASKS, "average"],
                [(whose, name, {**scores, **_average(scores)}) for whose, name, scores in rows],
            )
        )
    return tables


def _name(row: paper.Surgery, ours: Method) -> str:
    return row.name if ours.layers is None else f"{row.name}: {ours.layers}"


def _objective(settings: dict[str, Any]) -> str | None:
    given = settings.get("objective")  # results of before there was another have none
    if given is None:
        return None
    return OBJECTIVES["extra-layer" if given["extra_layer"] else "multi-objective"]


def _surgery(results: dict[str, Any]) -> str | None:
    """What was done to the checkpoint's layers, None where that is none of the paper's."""
    grown = results.get("grown")  # results of before do not say it
    if grown is None:
        return None
    layers = grown["layers"]
    if len(set(layers)) < len(layers):
        return "copy"
    return "drop" if layers == list(range(len(layers))) else None


def _average(scores: dict[str, Mean]) -> dict[str, Mean]:
    whole = all(task in scores for task in paper.SURGERY_TASKS)
    return {"average": Mean(statistics.fmean(scores[task].value for task in paper.SURGERY_TASKS))} if whole else {}
