"""One fine-tuning on one task of GLUE, and its scores."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from mslt.data import keyed
from mslt.evaluate.fine_tune import Batch, FineTuning, Part, fine_tune, predict
from mslt.evaluate.glue_data import Row, read_split
from mslt.evaluate.glue_scores import answers_of, scores
from mslt.evaluate.glue_tasks import TASKS, Metric, Preset, Task
from mslt.evaluate.multi_objective import MultiObjective, multi_objective_model
from mslt.evaluate.opening import open_config, open_fitting_tokenizer, open_with_new_head
from mslt.evaluate.positions import refuse_over_positions
from mslt.models.checkpoint import save_fine_tuned

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Source:
    """What all fine-tunings of a grid share: the checkpoint, and where the rows are. `max_train_rows` takes so many of
    the training rows, the same for all seeds; `objective` adds masked words to their labels."""

    checkpoint: str
    tokenizer: str | None = None
    data_dir: Path | None = None
    is_subset: bool = False
    max_train_rows: int | None = None
    new_pooler: bool = False
    objective: MultiObjective | None = None


@dataclass(frozen=True)
class Cell:
    """One fine-tuning of a grid."""

    task: str
    settings: FineTuning
    max_tokens: int
    best_epoch: bool
    headline: Metric

    @property
    def setting(self) -> str:
        return f"rate={self.settings.learning_rate:g}_batch={self.settings.batch_size}"

    @property
    def name(self) -> str:
        """A path below the grid's folder, without an ending."""
        return f"{self.task}/{self.setting}_seed={self.settings.seed}"


def cells_of(preset: Preset, tasks: Sequence[str], seeds: Sequence[int], precision: str) -> list[Cell]:
    """Every fine-tuning that the preset asks for."""
    return [
        Cell(
            task=task,
            settings=FineTuning(
                learning_rate=rate,
                batch_size=batch_size,
                num_epochs=preset.epochs.get(task, preset.num_epochs),
                seed=seed,
                warmup_share=preset.warmup_share,
                weight_decay=preset.weight_decay,
                precision=precision,
            ),
            max_tokens=preset.tokens.get(task, preset.max_tokens),
            best_epoch=preset.best_epoch,
            headline=preset.headline(task),
        )
        for task in tasks
        for rate in preset.rates.get(task, preset.learning_rates)
        for batch_size in preset.batches.get(task, preset.batch_sizes)
        for seed in seeds
    ]


def run_cell(source: Source, cell: Cell, model_folder: Path | None, device: str) -> dict[str, Any]:
    """Fine-tune and score: `{"cell": …, "epochs": [{split: {metric: value}}], "epoch": index of the one that counts,
    "headline": its score}`. With `model_folder` its model goes there, as Hugging Face keeps it."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # this is a process of its own
    task = TASKS[cell.task]
    tokenizer, model = opened(source, task, cell)
    model.to(device)
    rows = training_rows(source, task)
    heldout = {split: read_split(task, split, source.data_dir, source.is_subset) for split in task.validation}
    epochs: list[dict[str, dict[str, float]]] = []
    best: dict[str, torch.Tensor] | None = None
    trained: nn.Module = model
    parts: list[Part] = []
    if source.objective is not None:
        trained = multi_objective_model(model, source.checkpoint, tokenizer, source.objective, cell.settings.seed)
        parts = trained.parts(cell.settings.learning_rate)
    for num_done in fine_tune(
        trained, rows, lambda rows: collate(task, tokenizer, rows, cell.max_tokens), cell.settings, parts
    ):
        if cell.best_epoch or num_done == cell.settings.num_epochs:
            epochs.append({split: _scored(task, tokenizer, model, heldout[split], cell) for split in heldout})
            if model_folder is not None and best_epoch(epochs, cell.headline) == len(epochs) - 1:
                best = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    if model_folder is not None and best is not None:
        model.load_state_dict(best)
        save_fine_tuned(model_folder, model, tokenizer, {"checkpoint": source.checkpoint, "task": task.name,
                                                         "cell": asdict(cell)})  # fmt: skip
    chosen = best_epoch(epochs, cell.headline)
    return {"cell": asdict(cell), "epochs": epochs, "epoch": chosen,
            "headline": headline(epochs[chosen], cell.headline)}  # fmt: skip


def best_epoch(epochs: Sequence[dict[str, dict[str, float]]], metric: Metric) -> int:
    """Index of the first with the best headline."""
    return max(range(len(epochs)), key=lambda index: headline(epochs[index], metric))


def headline(by_split: dict[str, dict[str, float]], metric: Metric) -> float:
    """The metric, over MNLI's matched and mismatched sentences the mean."""
    return statistics.fmean(found[metric] for found in by_split.values())


def opened(source: Source, task: Task, cell: Cell) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """MsltError as from mslt.evaluate.opening, and where sentences may be longer than the model has positions."""
    config = open_config(source.checkpoint)
    tokenizer = open_fitting_tokenizer(config, source.checkpoint, source.tokenizer)
    refuse_over_positions(config, source.checkpoint, cell.max_tokens, "--max-tokens")
    return tokenizer, open_for(task, source.checkpoint, cell.settings.seed, source.new_pooler)


def open_for(task: Task, checkpoint: str, seed: int, new_pooler: bool) -> PreTrainedModel:
    """The checkpoint under a new classifier with the task's labels."""
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if not task.is_regression:
        head = {
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(task.labels)),
            "label2id": {name: i for i, name in enumerate(task.labels)},
        }
    return open_with_new_head(checkpoint, AutoModelForSequenceClassification, seed, new_pooler, **head)


def training_rows(source: Source, task: Task) -> list[Row]:
    rows = read_split(task, "train", source.data_dir, source.is_subset)
    if source.max_train_rows is None or source.max_train_rows >= len(rows):
        return rows
    order = np.argsort(keyed.bits(0, "training_subset", np.arange(len(rows))), kind="stable")
    return [rows[index] for index in sorted(order[: source.max_train_rows])]


def collate(task: Task, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_tokens: int) -> Batch:
    """input_ids, attention_mask and what else the tokenizer gives, [B, T] with T the longest row's, and labels [B]
    where there are any."""
    texts = [row.text for row in rows]
    pairs = None if rows[0].pair is None else [row.pair for row in rows]
    batch = dict(
        tokenizer(texts, pairs, truncation=True, max_length=max_tokens, padding="longest", return_tensors="pt")
    )
    if rows[0].label is not None:
        batch["labels"] = torch.tensor(
            [row.label for row in rows], dtype=torch.float32 if task.is_regression else torch.int64
        )
    return batch


def num_characters(row: Row) -> int:
    return len(row.text) + len(row.pair or "")


def logits_of(
    task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, rows: Sequence[Row], cell: Cell
) -> np.ndarray:
    """[rows, labels], in the order of the rows."""
    said = predict(
        model,
        rows,
        lambda rows: collate(task, tokenizer, rows, cell.max_tokens),
        EVALUATION_BATCH,
        cell.settings.precision,
        length=num_characters,
    )
    logits = torch.stack([logits for (logits, *_) in said]).numpy()
    if not np.isfinite(logits).all():
        raise FloatingPointError(f"{cell.name}: the model's logits are not finite: the fine-tuning diverged")
    return logits


def _scored(
    task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, rows: Sequence[Row], cell: Cell
) -> dict[str, float]:
    answers = answers_of(task, logits_of(task, tokenizer, model, rows, cell))
    return scores(task, answers, [row.label for row in rows if row.label is not None])
