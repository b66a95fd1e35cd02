"""GLUE's rows, from its own tsv files or from the hub, counted against the official splits.

GLUE's files have no quoting: a quotation mark is a character, a line is a row. CoLA's have no header, but for the test
split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset

from mslt.errors import MsltError
from mslt.evaluate.glue_tasks import TASKS, Task

HUB = "nyu-mll/glue"
_COLA_COLUMNS = ["source", "label", "original_label", "sentence"]
_FOLDERS = "https://gluebenchmark.com/tasks has them"


@dataclass(frozen=True)
class Row:
    """One or two sentences, and the label: its index, a score, or of a test split None."""

    text: str
    pair: str | None
    label: int | float | None


def read_split(task: Task, split: str, folder: Path | None, is_subset: bool = False) -> list[Row]:
    """The rows of a split in their order, from `folder` with GLUE's files, without one from the hub. MsltError for what
    cannot be read as the task's rows; unless `is_subset`, also where they are fewer or more than GLUE's."""
    rows = list(_from_hub(task, split) if folder is None else _from_file(task, split, folder))
    expected = task.rows[task.splits.index(split)]
    if not is_subset and len(rows) != expected:
        raise MsltError(
            f"{folder or HUB}: {task.name} {split} has {len(rows):,} rows, GLUE's has {expected:,}: it was split anew, "
            f"cut short, or read and written as CSV; take GLUE's own files ({_FOLDERS}), or say --subset"
        )
    if not rows:
        raise MsltError(f"{folder or HUB}: {task.name} {split} has no rows")
    return rows


def _path(task: Task, split: str, folder: Path) -> Path:
    return folder / task.folder / f"{task.files.get(split, split)}.tsv"


def _from_file(task: Task, split: str, folder: Path) -> Iterator[Row]:
    path = _path(task, split, folder)
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:  # a carriage return ends no row
            text = file.read()
    except FileNotFoundError:
        raise MsltError(
            f"{path}: not there; --data-dir names a folder with {', '.join(t.folder for t in TASKS.values())} of GLUE "
            f"({_FOLDERS})"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise MsltError(f"{path}: not readable as UTF-8 ({error}); take GLUE's own file ({_FOLDERS})") from None
    lines = [line.removesuffix("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
    is_test = split in task.test
    header = _COLA_COLUMNS if task.name == "CoLA" and not is_test else lines.pop(0)
    wanted = [*task.columns, *([] if is_test else [task.label_column])]
    missing = [column for column in wanted if column not in header]
    if missing:
        raise MsltError(
            f"{path}: has no column {', '.join(missing)}, but {', '.join(header)}; take GLUE's own file ({_FOLDERS})"
        )
    places = [header.index(column) for column in wanted]
    for number, cells in enumerate(lines, 1 + (header is not _COLA_COLUMNS)):
        if len(cells) <= max(places):
            if task.name == "QQP":  # three rows of GLUE's own file are torn; no count of QQP's holds them
                continue
            raise MsltError(
                f"{path}, line {number}: {len(cells)} columns, column {max(places) + 1} is needed; the line is torn, "
                f"or not separated by tabs. Take GLUE's own file ({_FOLDERS})"
            )
        first, *others = (cells[place] for place in places)
        label = None if is_test else _label(task, others.pop(), f"{path}, line {number}")
        yield Row(first, others[0] if others else None, label)


def _label(task: Task, written: str, where: str) -> int | float:
    if task.is_regression:
        try:
            return float(written)
        except ValueError:
            raise MsltError(f"{where}: the score is {written!r}, not a number; is it a test file?") from None
    if written not in task.labels:
        raise MsltError(
            f"{where}: the label is {written!r}, none of {', '.join(task.labels)}. A header where GLUE's file has "
            f"none, a test file, or other columns: take GLUE's own file ({_FOLDERS})"
        )
    return task.labels.index(written)


def _from_hub(task: Task, split: str) -> Iterator[Row]:
    try:
        table = load_dataset(HUB, task.hub_config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise MsltError(
            f"{HUB}: {task.name} {split} cannot be read from the hub ({first}); give a folder with GLUE's files "
            "by --data-dir"
        ) from None
    names = getattr(table.features["label"], "names", None)
    if names is not None and task.submits_labels and tuple(names) != task.labels:
        raise MsltError(
            f"{HUB}: {task.name} numbers its labels {', '.join(names)}, not {', '.join(task.labels)}: another dataset "
            "than GLUE's; give a folder with GLUE's files by --data-dir"
        )
    for row in table:
        text, *pair = (row[column] for column in task.hub_columns)
        yield Row(text, pair[0] if pair else None, None if split in task.test else row["label"])
