"""The ten probing tasks of SentEval (Conneau et al. 2018, arXiv:1805.01070), and files in its format: split, label and
text between tabs, a row a line.

R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mslt.data import keyed
from mslt.errors import MsltError
from mslt.files import write_text

SPLITS = ("tr", "va", "te")


@dataclass(frozen=True)
class ProbeTask:
    """`file` is SentEval's name for it, `num_hidden` the width of its probe, 0 for logistic regression."""

    name: str
    file: str
    num_hidden: int = 50


TASKS = {
    task.name: task
    for task in (
        ProbeTask("SentLen", "sentence_length.txt"),
        ProbeTask("WordContent", "word_content.txt", num_hidden=0),
        ProbeTask("TreeDepth", "tree_depth.txt"),
        ProbeTask("TopConstituents", "top_constituents.txt"),
        ProbeTask("BigramShift", "bigram_shift.txt"),
        ProbeTask("Tense", "past_present.txt"),
        ProbeTask("SubjNumber", "subj_number.txt"),
        ProbeTask("ObjNumber", "obj_number.txt"),
        ProbeTask("OddManOut", "odd_man_out.txt"),
        ProbeTask("CoordinationInversion", "coordination_inversion.txt"),
    )
}


@dataclass(frozen=True)
class ProbeRows:
    """`texts` [R] of all splits, `labels` [R] into `classes`, `splits` the indices of each split's rows."""

    texts: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    splits: dict[str, np.ndarray]

    @property
    def majority(self) -> float:
        """The share of test rows with the commonest label of the training rows."""
        commonest = np.bincount(self.labels[self.splits["tr"]]).argmax()
        return float((self.labels[self.splits["te"]] == commonest).mean())

    @property
    def majority_of_test(self) -> float:
        """The share of the commonest label of the test rows: where labels are spread otherwise there than among the
        training rows, a probe of nothing may come to as much, and what answers as those are spread to less than
        `majority`."""
        return float(np.bincount(self.labels[self.splits["te"]]).max() / len(self.splits["te"]))


def present_tasks(folder: Path) -> list[str]:
    """The tasks whose file lies there. MsltError where none does."""
    found = [name for name, task in TASKS.items() if (folder / task.file).is_file()]
    if not found:
        raise MsltError(f"--data-dir {folder}: holds no file of SentEval's probing tasks "
                        f"({', '.join(task.file for task in TASKS.values())})")  # fmt: skip
    return found


def read_rows(path: Path, max_train_rows: int | None = None) -> ProbeRows:
    """MsltError, with the line, for what is no row; for a file that was cut; for fewer than two labels, and for labels
    that no training row has. `max_train_rows` draws so many of the training rows."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise MsltError(f"{path}: not readable as UTF-8 ({error}); give a file in SentEval's format") from None
    if not text.endswith("\n"):
        raise MsltError(f"{path}: does not end with the end of a line: it was cut; copy it again, or end its last line")
    parsed = [_row(line.removesuffix("\r"), f"{path}, line {n}") for n, line in enumerate(text[:-1].split("\n"), 1)]
    splits = {split: np.array([i for i, row in enumerate(parsed) if row[0] == split]) for split in SPLITS}
    empty = [split for split, rows in splits.items() if not len(rows)]
    if empty:
        raise MsltError(f"{path}: has no row of split {', '.join(empty)}; it needs tr, va and te: was it cut?")
    if max_train_rows is not None:
        order = keyed.bits(0, "probe_subset", splits["tr"])
        splits["tr"] = np.sort(splits["tr"][np.argsort(order, kind="stable")[:max_train_rows]])
    classes = tuple(sorted({parsed[index][1] for index in splits["tr"]}))
    if len(classes) < 2:
        raise MsltError(f"{path}: all training rows have the label {classes[0]!r}; a probe needs two or more")
    for split in SPLITS[1:]:
        alien = sorted({parsed[index][1] for index in splits[split]} - set(classes))
        if alien:
            raise MsltError(
                f"{path}: {len(alien)} labels of split {split} are of no training row ({', '.join(alien[:5])}), so "
                "that no probe can know them; take these rows out, split anew, or train on more rows"
            )
    used = np.sort(np.concatenate(list(splits.values())))
    where = {row: place for place, row in enumerate(used.tolist())}
    number = {label: index for index, label in enumerate(classes)}
    return ProbeRows(
        texts=[parsed[row][2] for row in used],
        labels=np.array([number[parsed[row][1]] for row in used]),
        classes=classes,
        splits={split: np.array([where[row] for row in rows.tolist()]) for split, rows in splits.items()},
    )


def _row(line: str, where: str) -> tuple[str, str, str]:
    cells = line.split("\t")
    if len(cells) != 3:
        what = "was it cut?" if len(cells) < 3 else "the text may hold no tab: put a space there"
        raise MsltError(f"{where}: {len(cells)} cells between tabs, not split, label and text; {what}")
    split, label, text = cells
    if split not in SPLITS:
        raise MsltError(f"{where}: the split is {split!r}, not one of {', '.join(SPLITS)}")
    if not label or not text.strip():
        raise MsltError(f"{where}: the {'text' if label else 'label'} is empty; take the line out")
    return split, label, text


def write_rows(path: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    """Lines of (split, label, text)."""
    write_text(path, "".join("\t".join(row) + "\n" for row in rows))
