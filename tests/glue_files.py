"""A folder in GLUE's layout, made up: rows of few words whose label a small model can learn."""

import random
from collections.abc import Sequence
from pathlib import Path

from mslt.evaluate.glue_tasks import DIAGNOSTIC, TASKS

GOOD, BAD = ("good", "fine", "great", "nice"), ("bad", "poor", "awful", "sad")


ALL = ("SST-2", "CoLA", "STS-B", "MNLI", "RTE")


def write_glue(
    folder: Path, num_train: int = 256, num_dev: int = 32, tasks: Sequence[str] = ALL, seed: int = 0
) -> Path:
    """SST-2 and CoLA (good or bad words), STS-B (are two sentences both good or both bad), MNLI and RTE (a good or a
    bad second sentence). Test splits have as many rows as GLUE's, among them the diagnostic sentences."""
    draw = random.Random(seed)

    def write(path: Path, lines: list[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))

    def sentence() -> tuple[bool, str]:
        is_good = draw.random() < 0.5
        return is_good, f"the {draw.choice(('film', 'book'))} was {draw.choice(GOOD if is_good else BAD)} ."

    for name in tasks:
        task = TASKS[name]
        for split in task.splits:
            is_test = split in task.test
            count = task.rows[task.splits.index(split)] if is_test else num_train if split == "train" else num_dev
            rows = []
            for index in range(count):
                (first, a), (second, b) = sentence(), sentence()
                label = {
                    "STS-B": f"{5.0 * (first == second):.3f}",
                    "MNLI": "entailment" if second else "contradiction",
                    "RTE": "entailment" if second else "not_entailment",
                }.get(name, str(int(first)))
                texts = [a] if len(task.columns) == 1 else [a, b]
                if is_test:
                    rows.append([str(index), *texts])
                elif name == "CoLA":
                    rows.append(["src", label, "", *texts])
                else:
                    rows.append([*texts, label])
            header = [*(["index"] if is_test else []), *task.columns, *([] if is_test else [task.label_column])]
            lines = ["\t".join(row) for row in (rows if name == "CoLA" and not is_test else [header, *rows])]
            write(folder / task.folder / f"{task.files.get(split, split)}.tsv", lines)
    lines = ["\t".join(["index", *DIAGNOSTIC.columns])]
    lines += [f"{index}\t{sentence()[1]}\t{sentence()[1]}" for index in range(DIAGNOSTIC.rows[-1])]
    write(folder / "diagnostic" / "diagnostic.tsv", lines)
    return folder
