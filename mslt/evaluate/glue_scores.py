"""GLUE's metrics, all of a task's at once, by scikit-learn and SciPy."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from mslt.evaluate.glue_tasks import Task


def scores(task: Task, answers: Sequence[int | float], labels: Sequence[int | float]) -> dict[str, float]:
    """Accuracy, F1 (of label 1; of three labels their mean) and Matthews' correlation of labels, Pearson's and
    Spearman's of scores. A correlation with answers that are all alike is 0."""
    if task.is_regression:
        if len(set(answers)) < 2:
            return {"pearson": 0.0, "spearman": 0.0}
        found = {"pearson": pearsonr(answers, labels)[0], "spearman": spearmanr(answers, labels)[0]}
    else:
        found = {
            "accuracy": accuracy_score(labels, answers),
            "f1": f1_score(labels, answers, average="binary" if len(task.labels) == 2 else "macro", zero_division=0.0),
            "matthews": matthews_corrcoef(labels, answers),
        }
    return {name: float(value) for name, value in found.items()}


def answers_of(task: Task, logits: np.ndarray) -> list[int | float]:
    """[rows, labels] → the label of each row; of a regression [rows, 1] → its score, within GLUE's 0 to 5."""
    if task.is_regression:
        return [float(score) for score in np.clip(logits[:, 0], 0.0, 5.0)]
    return [int(label) for label in logits.argmax(axis=1)]
