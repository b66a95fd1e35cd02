"""What heads on hidden states are trained and scored on: rows of GLUE and windows of SQuAD, tokenised once.

B rows of a batch, T tokens, C labels.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mslt.data import keyed
from mslt.errors import MsltError
from mslt.evaluate import squad, squad_scores
from mslt.evaluate.fine_tune import Batch
from mslt.evaluate.glue import Source, headline, training_rows
from mslt.evaluate.glue_data import Row, read_split
from mslt.evaluate.glue_scores import answers_of, scores
from mslt.evaluate.glue_tasks import PRESETS, TASKS
from mslt.evaluate.squad_data import Question, Version, drawn, with_placed_answers
from mslt.evaluate.squad_data import digest as questions_digest
from mslt.files import canonical_json, sha256_text

SQUAD = "SQuAD"
Scores = dict[str, float]


@dataclass(frozen=True)
class Example:
    """`ids`, `types` [T] of a row. `label` holds a class, a score, or the start and end of a span; nothing where the
    row has none."""

    ids: np.ndarray
    types: np.ndarray
    label: tuple[float, ...]


@dataclass(frozen=True)
class PoolTask:
    """A task's tokenised rows, of `num_tokens` at most: `train`, and splits that are held out. `score` takes a split,
    numbers of its rows, and what a head says of them, fp32 on the CPU: [C], of spans [T, 2]. Rows of one of `groups` of
    `train`, like windows of one context, are trained on together or not at all. `labels` are a classification's,
    `reading` what else was chosen for reading the rows. `digest` tells splits apart by all that training and scores
    depend on, labels and SQuAD's answers, too."""

    name: str
    num_labels: int
    is_span: bool
    is_regression: bool
    labels: tuple[str, ...]
    num_tokens: int
    metric: str
    train: list[Example]
    groups: list[int]
    heldout: dict[str, list[Example]]
    score: Callable[[str, Sequence[int], Sequence[torch.Tensor]], Scores]
    digest: Callable[[str], str]
    reading: dict[str, str | int] = field(default_factory=dict)

    def digests(self) -> dict[str, str]:
        return {split: self.digest(split) for split in ("train", *self.heldout)}

    def headline(self, by_split: dict[str, Scores]) -> float:
        """0 … 1, of MNLI the mean of its halves: the metric that BERTVision reports."""
        if self.is_span:
            return next(iter(by_split.values()))[self.metric] / 100
        return headline(by_split, self.metric)  # type: ignore[arg-type]


def glue_task(
    source: Source, name: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int, with_train: bool = True
) -> PoolTask:
    """MsltError as from `read_split`; without `with_train` only splits that are held out are read."""
    task = TASKS[name]
    rows = {split: read_split(task, split, source.data_dir, source.is_subset) for split in task.validation}
    rows["train"] = training_rows(source, task) if with_train else []
    examples = {split: glue_examples(each, tokenizer, num_tokens) for split, each in rows.items()}

    def score(split: str, numbers: Sequence[int], said: Sequence[torch.Tensor]) -> Scores:
        answers = answers_of(task, torch.stack(list(said)).numpy())
        return scores(task, answers, [examples[split][number].label[0] for number in numbers])

    return PoolTask(
        name=name,
        num_labels=max(len(task.labels), 1),
        is_span=False,
        is_regression=task.is_regression,
        labels=task.labels,
        num_tokens=num_tokens,
        metric=PRESETS["bertvision"].headline(name),
        train=examples["train"],
        groups=list(range(len(examples["train"]))),
        heldout={split: examples[split] for split in task.validation},
        score=score,
        digest=lambda split: sha256_text(
            canonical_json([rows_digest(examples[split]), [each.label for each in examples[split]]])
        ),
    )


def glue_examples(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[Example]:
    """As `mslt evaluate glue` cuts them."""
    if not rows:
        return []
    texts = [row.text for row in rows]
    pairs = None if rows[0].pair is None else [row.pair for row in rows]
    made = tokenizer(texts, pairs, truncation=True, max_length=num_tokens)
    types = made.get("token_type_ids") or [[0] * len(ids) for ids in made["input_ids"]]
    return [
        Example(np.array(ids, np.int32), np.array(of, np.int8), () if row.label is None else (row.label,))
        for ids, of, row in zip(made["input_ids"], types, rows, strict=True)
    ]


@dataclass(frozen=True)
class SquadFiles:
    """Questions to train on and to score on."""

    train: Sequence[Question]
    dev: Sequence[Question]
    version: Version = "2.0"
    max_train_questions: int | None = None


def squad_task(files: SquadFiles, tokenizer: PreTrainedTokenizerBase, shape: squad.Shape) -> PoolTask:
    """Questions whose answer stands nowhere are not trained on; which ones are drawn is the same for all seeds."""
    wanted = drawn(files.train, files.max_train_questions or len(files.train), 0)
    questions = {"train": with_placed_answers(wanted)[0], "dev": list(files.dev)}
    if files.train and not questions["train"]:
        raise MsltError("SQuAD: no answer to train on stands where its answer_start says; nothing can be learned")
    windows = {split: squad.windows_of(each, tokenizer, shape) for split, each in questions.items()}
    examples = {split: [Example(w.ids, w.types, (w.start, w.end)) for w in each] for split, each in windows.items()}
    contexts = {question.context: number for number, question in enumerate(questions["train"])}

    def score(split: str, numbers: Sequence[int], said: Sequence[torch.Tensor]) -> Scores:
        chosen = [windows[split][number] for number in numbers]
        place = {old: new for new, old in enumerate(dict.fromkeys(window.question_index for window in chosen))}
        asked = [questions[split][index] for index in place]
        read = [replace(window, question_index=place[window.question_index]) for window in chosen]
        prediction = squad.decide(asked, read, [(ends[:, 0].numpy(), ends[:, 1].numpy()) for ends in said])
        answers = prediction.answers
        if files.version == "2.0":
            answers = squad_scores.at_threshold(answers, prediction.null_odds, 0.0)
        return squad_scores.score(asked, answers, files.version)

    return PoolTask(
        name=SQUAD,
        num_labels=2,
        is_span=True,
        is_regression=False,
        labels=(),
        num_tokens=shape.sequence_length,
        metric="exact",
        train=examples["train"],
        groups=[contexts[questions["train"][window.question_index].context] for window in windows["train"]],
        heldout={"dev": examples["dev"]},
        score=score,
        digest=lambda split: sha256_text(rows_digest(examples[split]) + questions_digest(questions[split])),
        reading={"version": files.version, "stride": shape.stride, "question_tokens": shape.question_tokens},
    )


@dataclass(frozen=True)
class Collate:
    """Makes batches of examples: `padded`, to `num_tokens` where padding is read, and labels [B], of spans [B, 2],
    where they have any; `read_BT` marks the tokens that heads read."""

    task: PoolTask
    pad_id: int
    has_types: bool
    keeps_padding: bool = False

    def __call__(self, examples: Sequence[Example]) -> Batch:
        num_tokens = self.task.num_tokens if self.keeps_padding else None
        batch = squad.padded([(each.ids, each.types) for each in examples], self.pad_id, self.has_types, num_tokens)
        read_BT = batch["attention_mask"].bool()
        batch["read_BT"] = torch.ones_like(read_BT) if self.keeps_padding else read_BT
        return {**batch, **self.labels(examples)}

    def labels(self, examples: Sequence[Example]) -> Batch:
        if not examples[0].label:
            return {}
        dtype = torch.float32 if self.task.is_regression else torch.int64
        labels = torch.tensor([each.label for each in examples], dtype=dtype)
        return {"labels": labels if self.task.is_span else labels[:, 0]}

    def num_read(self, example: Example) -> int:
        """How many tokens of a row heads read."""
        return self.task.num_tokens if self.keeps_padding else len(example.ids)


def collate_of(
    task: PoolTask, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, keeps_padding: bool = False
) -> Collate:
    return Collate(task, tokenizer.pad_token_id, has_types(config), keeps_padding)


def has_types(config: PretrainedConfig) -> bool:
    """Whether the model tells a row's first text from its second."""
    return getattr(config, "type_vocab_size", 0) > 1


def rows_digest(examples: Sequence[Example]) -> str:
    """Of ids and types, not of labels: what hidden states depend on."""
    hashed = hashlib.sha256()
    for each in examples:
        hashed.update(len(each.ids).to_bytes(4, "little"))
        hashed.update(each.ids.astype(np.int32).tobytes())
        hashed.update(each.types.astype(np.int8).tobytes())
    return hashed.hexdigest()


def split_off(groups: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers to train on and, of a keyed `share` of the groups, to choose settings by; both in order. MsltError
    where there are too few to do both."""
    every = sorted(set(groups))
    order = np.argsort(keyed.bits(seed, "pool_choosing", np.arange(len(every))), kind="stable")
    held = {every[index] for index in order[: max(round(share * len(every)), 1)]}
    if len(held) == len(every):
        raise MsltError(
            f"--choose-share {share:g}: of {len(every)} rows, or contexts, none is left to train on; give more, or "
            "a smaller share"
        )
    rest, chosen = (
        [row for row, group in enumerate(groups) if (group in held) == is_held] for is_held in (False, True)
    )
    return rest, chosen
