"""What GLUE's server takes: a zip with a tsv for each task, the diagnostic sentences among them."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification

from mslt.evaluate.glue import Cell, Source, logits_of
from mslt.evaluate.glue_data import read_split
from mslt.evaluate.glue_scores import answers_of
from mslt.evaluate.glue_tasks import DIAGNOSTIC, TASKS, Task
from mslt.evaluate.opening import open_model, open_tokenizer
from mslt.files import whole_file


def answer_tests(source: Source, cell: Cell, model_folder: Path, device: str) -> dict[str, Any]:
    """The answers to the task's test splits, of MNLI to the diagnostic sentences, too: `{name in the zip: [label or
    score]}`."""
    tokenizer = open_tokenizer(str(model_folder))
    model, _ = open_model(str(model_folder), AutoModelForSequenceClassification)
    model.to(device)
    answers = {}
    for task in asked(TASKS[cell.task]):
        for split, name in zip(task.test, zip_names(task), strict=True):
            rows = read_split(task, split, source.data_dir)  # the server wants all of them
            answers[name] = answers_of(task, logits_of(task, tokenizer, model, rows, cell))
    return answers


def asked(task: Task) -> tuple[Task, ...]:
    """The tasks that a model of this one answers."""
    return (task, DIAGNOSTIC) if task.name == "MNLI" else (task,)


def zip_names(task: Task) -> Sequence[str]:
    return task.zip_names or (task.name,)


def write_submission(path: Path, answers: dict[str, list[int | float]]) -> list[str]:
    """Write the zip. The server wants every task: those without answers get one label throughout, and their names are
    returned."""
    filled = []
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as submission:
        for task in (*TASKS.values(), DIAGNOSTIC):
            counts = task.rows[-len(task.test) :]
            for name, count in zip(zip_names(task), counts, strict=True):
                if name not in answers:
                    filled.append(name)
                written = [_written(task, answer) for answer in answers.get(name, [0] * count)]
                lines = ["index\tprediction", *(f"{index}\t{answer}" for index, answer in enumerate(written))]
                submission.writestr(f"{name}.tsv", "\n".join(lines) + "\n")
    return filled


def _written(task: Task, answer: int | float) -> str:
    if task.is_regression:
        return f"{answer:.3f}"
    return task.labels[int(answer)] if task.submits_labels else str(int(answer))
