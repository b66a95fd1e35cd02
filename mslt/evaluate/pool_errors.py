"""Where two classifiers are right and wrong on the same rows (BERTVision, section 5.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from mslt.errors import MsltError
from mslt.evaluate.exits import refuse_labels
from mslt.evaluate.glue import Source
from mslt.evaluate.glue_scores import answers_of
from mslt.evaluate.glue_tasks import BINARY, TASKS, Task
from mslt.evaluate.opening import locate, open_config, open_fitting_tokenizer, open_model
from mslt.evaluate.pool import Pooled, logits_of, on_the_fly, open_heads, refuse_not_finite, whole_logits
from mslt.evaluate.pool_data import PoolTask, collate_of, glue_task
from mslt.heads.pooling import DESCRIPTION
from mslt.models import families


def positive_of(task: Task) -> int | None:
    """The label that counts as positive: 1, of RTE and QNLI entailment; None where there are more than two."""
    if len(task.labels) != 2:
        return None
    return 1 if task.labels == BINARY else task.labels.index("entailment")


def compared(labels: Sequence[int], answers: dict[str, Sequence[int]], positive: int | None) -> dict[str, Any]:
    """Of each of two its shares of rows right, of rows predicted positive, of positives found (recall) and of negatives
    right; and of both: rows that both get right and that neither does, as shares of all, and of those that one of them
    does the share that both do."""
    truth = np.array(labels)
    right = {name: np.array(said) == truth for name, said in answers.items()}
    each: dict[str, dict[str, float | None]] = {}
    for name, said in answers.items():
        each[name] = {"right": float(right[name].mean())}
        if positive is not None:
            is_positive = truth == positive
            each[name] |= {
                "predicted_positive": float((np.array(said) == positive).mean()),
                "recall": _share(right[name], is_positive),
                "negatives_right": _share(right[name], ~is_positive),
            }
    first, second = right.values()
    return {
        "rows": len(truth),
        "each": each,
        "both_right": float((first & second).mean()),
        "neither_right": float((~first & ~second).mean()),
        "both_of_either": _share(first & second, first | second),
        "first_alone_right": float((first & ~second).mean()),
        "second_alone_right": float((~first & second).mean()),
    }


def _share(hits: np.ndarray, among: np.ndarray) -> float | None:
    return float(hits[among].mean()) if among.any() else None


def errors(
    paths: Sequence[Path], task_name: str | None, data_dir: Path | None, is_subset: bool, split: str | None,
    device: str, tokenizer: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Two folders, each a head's or a fine-tuned classifier's, on a split of one task. MsltError where they are of
    other tasks, of a regression, or neither."""
    opened = [_opened(path, device, tokenizer) for path in paths]
    names = {name for name, *_ in opened if name is not None} | ({task_name} if task_name else set())
    if len(names) != 1 or not names <= TASKS.keys():
        said = ", ".join(sorted(names)) or "none"
        raise MsltError(f"{paths[0]}, {paths[1]}: of which task? They say {said}; name by --task one of GLUE on which "
                        "both were trained")  # fmt: skip
    task = TASKS[names.pop()]
    if task.is_regression:
        raise MsltError(f"{task.name}: scores are neither right nor wrong; take a task with labels")
    if split is not None and split not in task.validation:
        raise MsltError(f"--split {split}: {task.name} has {', '.join(task.validation)}")
    chosen = split or task.validation[0]
    answers: dict[str, Sequence[int]] = {}
    labels: list[int] = []
    for path, (_, answer) in zip(paths, opened, strict=True):
        logits, pool_task = answer(task, data_dir, is_subset, chosen)
        labels = [int(each.label[0]) for each in pool_task.heldout[chosen]]
        name = str(path) if str(path) not in answers else f"{path} again"
        answers[name] = [int(each) for each in answers_of(task, torch.stack(logits).numpy())]
    found = compared(labels, answers, positive_of(task))
    positive = positive_of(task)
    return {
        "task": task.name,
        "split": chosen,
        "positive": None if positive is None else task.labels[positive],
        **found,
    }


def _opened(path: Path, device: str, tokenizer_source: str | None) -> tuple[str | None, Any]:
    """The task that is said to be answered, and what answers it."""
    if (path / DESCRIPTION).is_file():
        backbone, (opened,) = open_heads([path], device, None, tokenizer_source)
        described = opened.described

        def by_head(task: Task, data_dir: Path | None, is_subset: bool, split: str) -> tuple[Any, PoolTask]:
            source = Source(backbone.source, None, data_dir, is_subset)
            rows = glue_task(source, task.name, backbone.tokenizer, described["max_tokens"], with_train=False)
            whole = Pooled(backbone.model, [opened.head])
            collate = backbone.collate(rows, opened.head.settings.pad_states == "keep")
            examples = rows.heldout[split]
            (said,) = logits_of(whole, range(len(examples)), examples, on_the_fly(examples, collate), "fp32")
            refuse_not_finite(said, str(path))
            return said, rows

        return described.get("task"), by_head
    model_folder = locate(str(path))[0]
    config = open_config(model_folder)
    if not families.is_classifiers_config(config):
        raise MsltError(f"{path}: holds neither a head of `mslt pool train` nor a fine-tuned classifier; name one of "
                        "them")  # fmt: skip
    tokenizer = open_fitting_tokenizer(config, model_folder, tokenizer_source)
    model, missing = open_model(model_folder, AutoModelForSequenceClassification)
    if missing:
        raise MsltError(f"{path}: lacks weights ({', '.join(missing[:3])}); it is damaged")
    model.to(device)

    def by_model(task: Task, data_dir: Path | None, is_subset: bool, split: str) -> tuple[Any, PoolTask]:
        refuse_labels(str(path), model, task)
        num_tokens = min(families.num_positions(config), 512)
        source = Source(model_folder, None, data_dir, is_subset)
        rows = glue_task(source, task.name, tokenizer, num_tokens, with_train=False)
        examples = rows.heldout[split]
        return whole_logits(model, range(len(examples)), examples, collate_of(rows, config, tokenizer), "fp32"), rows

    return None, by_model
