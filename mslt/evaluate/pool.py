"""Heads on all hidden states of a frozen encoder: trained, scored, and beside them the whole model fine-tuned.

Heads of one task share every pass of the encoder, and each trains as it would alone.

B rows, T tokens, N tokens of all rows that heads read, L hidden states, D width, H heads, C labels.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from mslt.data import keyed
from mslt.errors import MsltError
from mslt.evaluate.fine_tune import Batch, FineTuning, Part, fine_tune, predict
from mslt.evaluate.glue import EVALUATION_BATCH, open_for
from mslt.evaluate.glue_data import Row
from mslt.evaluate.glue_tasks import TASKS
from mslt.evaluate.opening import (
    locate,
    open_config,
    open_fitting_tokenizer,
    open_model,
    open_with_new_head,
    refuse_without_layers,
    tokenizer_digest,
)
from mslt.evaluate.pool_cache import StatesCache
from mslt.evaluate.pool_data import SQUAD, Collate, Example, PoolTask, Scores, collate_of, glue_examples, has_types
from mslt.evaluate.positions import refuse_over_positions
from mslt.evaluate.squad import padded
from mslt.heads.pooling import (
    HeadSettings,
    PoolingHead,
    backbone_of,
    load_head,
    loss_of,
    packed_states,
    project_together,
    read_description,
    states_of_all,
)

BatchOf = Callable[[Sequence[int]], Batch]


@dataclass(frozen=True)
class Backbone:
    """A frozen encoder, and what heads say of it."""

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    described: dict[str, Any]

    def collate(self, task: PoolTask, keeps_padding: bool) -> Collate:
        return collate_of(task, self.model.config, self.tokenizer, keeps_padding)


def open_backbone(source: str, tokenizer_source: str | None, device: str | torch.device) -> Backbone:
    """The encoder of any checkpoint, whatever stands on it. MsltError as from mslt.evaluate.opening."""
    config = open_config(source)
    tokenizer = open_fitting_tokenizer(config, source, tokenizer_source)
    model, missing = open_model(source, AutoModel)
    refuse_without_layers(source, missing)
    return frozen(source, model, tokenizer, device)


def frozen(
    source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str | torch.device
) -> Backbone:
    model.requires_grad_(False).eval().to(device)
    model.name_or_path = str(Path(source).resolve()) if Path(source).is_dir() else source
    return Backbone(source, model, tokenizer, {**backbone_of(model), "tokenizer": tokenizer_digest(tokenizer)})


class Pooled(nn.Module):
    """A frozen encoder and heads on it, which share its pass. Tokens [B, T] go in, or what a cache holds of them,
    `h_NLD`; out come the logits of heads of one task, [B, H, C] or [B, H, T, 2], and with labels the sum of their
    losses; `all_logits` is for heads of several. MsltError for heads of which one reads padding and another does
    not."""

    def __init__(self, model: PreTrainedModel, heads: Sequence[PoolingHead]) -> None:
        super().__init__()
        if len({head.settings.pad_states for head in heads}) > 1:
            raise MsltError("pad_states: heads of one pass read padding, or none does; train them apart")
        self.model = model
        self.heads = nn.ModuleList(heads)
        self.settings = [head.settings for head in heads]
        self.states = states_of_all(self.settings)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def train(self, mode: bool = True) -> "Pooled":
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self,
        read_BT: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        h_NLD: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        every = self.all_logits(read_BT, input_ids, attention_mask, token_type_ids, h_NLD)
        loss = None
        if labels is not None:
            loss = sum(loss_of(own, logits, labels) for own, logits in zip(self.settings, every, strict=True))
        return SequenceClassifierOutput(loss=loss, logits=torch.stack(every, 1))

    def all_logits(
        self,
        read_BT: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        h_NLD: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Of each head, of whatever task, on the tokens that `read_BT` marks: [B, C], of spans [B, T, 2]."""
        if h_NLD is None:
            assert input_ids is not None
            assert attention_mask is not None
            h_NLD = packed_states(self.model, input_ids, attention_mask, token_type_ids, read_BT, self.states)
        together: dict[tuple[int, int], list[int]] = {}
        for index, own in enumerate(self.settings):
            if own.kind == "adapter" and own.tokens != "first":
                together.setdefault((own.states.start, own.states.stop), []).append(index)
        projected: dict[int, torch.Tensor] = {}
        for indices in together.values():
            if len(indices) > 1:
                heads = [self._head(index) for index in indices]
                found = project_together(heads, self._of(h_NLD, indices[0]))
                projected.update(zip(indices, found, strict=True))
        return [
            self._head(index)(self._of(h_NLD, index), read_BT, projected.get(index))
            for index in range(len(self.settings))
        ]

    def _head(self, index: int) -> PoolingHead:
        head = self.heads[index]
        assert isinstance(head, PoolingHead)
        return head

    def _of(self, h_NLD: torch.Tensor, index: int) -> torch.Tensor:
        own = self.settings[index].states
        return h_NLD[:, own.start - self.states.start : own.stop - self.states.start]


def on_the_fly(examples: Sequence[Example], collate: Collate) -> BatchOf:
    return lambda rows: collate([examples[row] for row in rows])


def from_cache(cache: StatesCache, examples: Sequence[Example], collate: Collate, states: range) -> BatchOf:
    def batch_of(rows: Sequence[int]) -> Batch:
        lengths_B = torch.from_numpy(cache.lengths[list(rows)])
        read_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
        return {"h_NLD": cache.read(rows, states), "read_BT": read_BT, **collate.labels([examples[r] for r in rows])}

    return batch_of


def train_heads(
    whole: Pooled,
    rows: Sequence[int],
    batch_of: BatchOf,
    settings: FineTuning,
    rates: Sequence[float],
    looks: int = 1,
) -> Iterator[float]:
    """Train the heads in place, each at its rate, as it would alone; the encoder gets no gradient. Yields as
    `fine_tune`."""
    whole.model.requires_grad_(False)
    parts = [Part(head, rate) for head, rate in zip(whole.heads, rates, strict=True)]
    yield from fine_tune(whole, rows, batch_of, settings, parts, looks)  # type: ignore[arg-type]
    whole.eval()


def logits_of(
    whole: Pooled, rows: Sequence[int], examples: Sequence[Example], batch_of: BatchOf, precision: str
) -> list[list[torch.Tensor]]:
    """What each head says of each row, in their order: [C], of spans [T, 2]."""
    said = predict(whole, rows, batch_of, EVALUATION_BATCH, precision, lambda row: len(examples[row].ids))  # type: ignore[arg-type]
    found: list[list[torch.Tensor]] = [[] for _ in whole.settings]
    for row, (logits,) in zip(rows, said, strict=True):
        for own, logits_of_head in zip(found, logits, strict=True):
            own.append(
                logits_of_head[: len(examples[row].ids)] if whole.settings[0].tokens == "each" else logits_of_head
            )
    return found


class Diverged(MsltError):
    """A training whose model says nothing that is finite."""


def are_finite(said: Sequence[torch.Tensor]) -> bool:
    return all(bool(logits.isfinite().all()) for logits in said)


def refuse_not_finite(said: Sequence[torch.Tensor], what: str) -> None:
    if not are_finite(said):
        raise Diverged(f"{what}: its logits are not finite, its training diverged; a lower learning rate helps, or "
                       "--precision fp32")  # fmt: skip


def score_heads(whole: Pooled, task: PoolTask, collate: Collate, precision: str) -> list[dict[str, Scores] | None]:
    """Of each head all metrics of each split that is held out; None of one whose logits are not all finite."""
    said = {
        split: logits_of(whole, range(len(examples)), examples, on_the_fly(examples, collate), precision)
        for split, examples in task.heldout.items()
    }
    return [
        {split: task.score(split, range(len(of_heads[index])), of_heads[index]) for split, of_heads in said.items()}
        if all(are_finite(of_heads[index]) for of_heads in said.values())
        else None
        for index in range(len(whole.settings))
    ]


def speedup_of_layers(model: PreTrainedModel, collate: Collate, last_state: int, num_turns: int = 5) -> float:
    """How many times as fast the encoder is without the layers above hidden state `last_state`: the same batches one
    way and the other in turn, the fastest turn of each, which other work on the machine disturbs least."""
    examples = collate.task.train[:EVALUATION_BATCH]
    batch = {name: tensor.to(model.device) for name, tensor in collate(examples).items()}
    seconds: dict[int, list[float]] = {last_state: [], model.config.num_hidden_layers: []}
    for _ in range(num_turns + 1):
        for last, taken in seconds.items():
            began = time.perf_counter()
            packed_states(model, batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"),
                          batch["read_BT"], range(last, last + 1)).sum().item()  # fmt: skip
            taken.append(time.perf_counter() - began)
    cut, full = (min(seconds[last][1:]) for last in (last_state, model.config.num_hidden_layers))
    return full / cut


# Heads in folders


@dataclass(frozen=True)
class OpenedHead:
    """A folder that `mslt pool train` wrote."""

    folder: Path
    head: PoolingHead
    described: dict[str, Any]


def open_heads(
    folders: Sequence[Path], device: str | torch.device, checkpoint: str | None = None, tokenizer: str | None = None
) -> tuple[Backbone, list[OpenedHead]]:
    """Heads of one encoder, and that encoder: `checkpoint`, or the one that the first names; its tokenizer is its own,
    or the one that `tokenizer` names. MsltError where one of the heads is of another encoder or tokenizer."""
    all_described = [read_description(folder) for folder in folders]
    backbone = open_backbone(locate(checkpoint or all_described[0]["backbone"])[0], tokenizer, device)
    found = []
    for folder, described in zip(folders, all_described, strict=True):
        head = load_head(folder, backbone.model, backbone.described)
        unsaid = [name for name in ("task", "labels", "max_tokens", "sizes") if name not in described]
        if unsaid:
            raise MsltError(f"{folder}: does not say its {', '.join(unsaid)}; train the head by `mslt pool train`")
        if described["task"] not in (*TASKS, SQUAD):
            raise MsltError(f"{folder}: is of task {described['task']}; take one of {', '.join((*TASKS, SQUAD))}")
        if described.get("tokenizer") != backbone.described["tokenizer"]:
            raise MsltError(
                f"{folder}: was trained with another tokenizer than {tokenizer or backbone.source} holds; give the "
                "one it was trained with by --tokenizer"
            )
        found.append(OpenedHead(folder, head, described))
    return backbone, found


@torch.inference_mode()
def answers_on(
    backbone: Backbone, opened: Sequence[OpenedHead], text: str, pair: str | None = None
) -> list[dict[str, Any]]:
    """What each head says of one text, all in one pass: the label and every label's share, or the score. MsltError for
    heads for spans, for a pair where a task has one sentence and no pair where it has two, and for a text of more
    tokens than one of the heads was trained on while another takes more."""
    spans = [str(each.folder) for each in opened if each.head.settings.tokens == "each"]
    if spans:
        raise MsltError(f"{spans[0]}: finds answers of questions in contexts; leave it out, or the text")
    for each in opened:
        name = each.described["task"]
        if (len(TASKS[name].columns) == 2) != (pair is not None):
            wants = "one sentence; leave --pair out" if pair is not None else "two sentences; give the second by --pair"
            raise MsltError(f"{each.folder}: {name} has {wants}, or this head")
    whole = Pooled(backbone.model, [each.head for each in opened]).eval()
    keeps = opened[0].head.settings.pad_states == "keep"
    every = [each.described["max_tokens"] for each in opened]
    num_tokens = max(every)
    if keeps and min(every) < num_tokens:
        raise MsltError(f"heads that read padding, of rows of {min(every)} and of {num_tokens} tokens: ask them apart")
    (example,) = glue_examples([Row(text, pair, None)], backbone.tokenizer, num_tokens)
    if len(example.ids) > min(every):
        raise MsltError(f"--text: is {len(example.ids)} tokens, and {opened[every.index(min(every))].folder} takes "
                        f"{min(every)}; give a shorter one, or ask heads of other lengths apart")  # fmt: skip
    batch = padded([(example.ids, example.types)], backbone.tokenizer.pad_token_id, has_types(backbone.model.config),
                   num_tokens if keeps else None)  # fmt: skip
    batch = {name: tensor.to(backbone.model.device) for name, tensor in batch.items()}
    mask = batch["attention_mask"]
    read_BT = torch.ones_like(mask).bool() if keeps else mask.bool()
    found = []
    for each, logits in zip(
        opened, whole.all_logits(read_BT, batch["input_ids"], mask, batch.get("token_type_ids")), strict=True
    ):
        labels, shares = each.described["labels"], logits[0].float().softmax(-1).tolist()
        answer = labels[int(logits[0].argmax())] if labels else f"{float(logits[0, 0]):.3f}"
        found.append({"folder": str(each.folder), "task": each.described["task"], "answer": answer,
                      "shares": dict(zip(labels, shares, strict=True)) if labels else {}})  # fmt: skip
    return found


# What a state is worth


class _WithoutEach(nn.Module):
    """A head's logits, [B, 1 + L, C] or [B, 1 + L, T, 2]: with all states, then without each."""

    def __init__(self, model: PreTrainedModel, head: PoolingHead) -> None:
        super().__init__()
        self.model = model
        self.head = head

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, read_BT: torch.Tensor,
        token_type_ids: torch.Tensor | None = None, labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        states = self.head.settings.states
        h_NLD = packed_states(self.model, input_ids, attention_mask, token_type_ids, read_BT, states)
        each = [self.head(h_NLD, read_BT, without=index) for index in (None, *range(len(states)))]
        return {"logits": torch.stack(each, 1)}


def importance(backbone: Backbone, head: PoolingHead, task: PoolTask) -> dict[str, Any]:
    """Of each hidden state that the head reads its weight in a mix, and what the headline loses without it. MsltError
    for a head that reads one."""
    settings = head.settings
    refuse_one_state(settings)
    collate = backbone.collate(task, settings.pad_states == "keep")
    whole = _WithoutEach(backbone.model, head)
    by_variant: list[dict[str, Scores]] = [{} for _ in range(1 + len(settings.states))]
    for split, examples in task.heldout.items():
        said = predict(whole, examples, collate, EVALUATION_BATCH, "fp32", lambda each: len(each.ids))  # type: ignore[arg-type]
        for index, scores in enumerate(by_variant):
            own = [logits[index] for (logits,) in said]
            if settings.tokens == "each":
                own = [logits[: len(each.ids)] for logits, each in zip(own, examples, strict=True)]
            scores[split] = task.score(split, range(len(own)), own)
    full, *without = (task.headline(scores) for scores in by_variant)
    return {
        "states": list(settings.states),
        "headline": full,
        "without": without,
        "drop": [full - each for each in without],
        "weights": head.layer_weights().tolist() if settings.kind == "mix" else None,
    }


def refuse_one_state(settings: HeadSettings) -> None:
    if len(settings.states) < 2:
        raise MsltError(f"pooler {settings.kind}: reads one hidden state, which cannot be left out; take another head")


# The whole model


def open_whole(source: str, task: PoolTask, seed: int, new_pooler: bool) -> PreTrainedModel:
    """The checkpoint under a new head of its own for the task."""
    if task.is_span:
        return open_with_new_head(source, AutoModelForQuestionAnswering, seed)
    return open_for(TASKS[task.name], source, seed, new_pooler)


def whole_batch_of(examples: Sequence[Example], collate: Collate) -> BatchOf:
    """As transformers' own heads take them."""

    def batch_of(rows: Sequence[int]) -> Batch:
        batch = collate([examples[row] for row in rows])
        batch.pop("read_BT")
        if collate.task.is_span:
            start_B, end_B = batch.pop("labels").unbind(1)
            batch |= {"start_positions": start_B, "end_positions": end_B}
        return batch

    return batch_of


def whole_logits(
    model: PreTrainedModel, rows: Sequence[int], examples: Sequence[Example], collate: Collate, precision: str
) -> list[torch.Tensor]:
    """As `logits_of`."""
    said = predict(model, rows, whole_batch_of(examples, collate), EVALUATION_BATCH, precision,
                   lambda row: len(examples[row].ids))  # fmt: skip
    if collate.task.is_span:
        found = [
            torch.stack([start, end], 1)[: len(examples[row].ids)] for row, (start, end) in zip(rows, said, strict=True)
        ]
    else:
        found = [logits for (logits, *_) in said]
    refuse_not_finite(found, "the model")
    return found


def score_whole(model: PreTrainedModel, task: PoolTask, collate: Collate, precision: str) -> dict[str, Scores]:
    found = {}
    for split, examples in task.heldout.items():
        rows = range(len(examples))
        found[split] = task.score(split, rows, whole_logits(model, rows, examples, collate, precision))
    return found


def rows_of_epochs(num_rows: int, num_epochs: float, seed: int) -> tuple[list[int], int]:
    """Row numbers and whole epochs: below 1 the first share of a keyed order, once. MsltError for 0, or for 1.5."""
    if not 0 < num_epochs < math.inf or (num_epochs > 1 and num_epochs != int(num_epochs)):
        raise MsltError(f"--backbone-epochs {num_epochs:g}: give a share of one, like 0.3, or a whole number")
    if num_epochs >= 1:
        return list(range(num_rows)), int(num_epochs)
    order = np.argsort(keyed.bits(seed, "backbone_share", np.arange(num_rows)), kind="stable")
    return sorted(order[: max(round(num_epochs * num_rows), 1)].tolist()), 1


def refuse_long(task_tokens: int, source: str) -> None:
    """MsltError where the checkpoint has fewer positions."""
    refuse_over_positions(open_config(source), source, task_tokens, "--max-tokens")


def states_of(layers: str, num_layers: int) -> tuple[int, int]:
    """First and last hidden state of `all`, or of `i:j` with both ends. MsltError for anything else."""
    if layers == "all":
        return 0, num_layers
    first, colon, last = layers.partition(":")
    if not (colon and first.isdigit() and last.isdigit()) or not int(first) <= int(last) <= num_layers:
        raise MsltError(f"--layers {layers}: give all, or two hidden states like 1:{num_layers}, both included; this "
                        f"encoder has 0 (embeddings) to {num_layers}")  # fmt: skip
    return int(first), int(last)


def head_settings(
    task: PoolTask, width: int, states: tuple[int, int], kind: Any, adapter_width: int, tokens: Any, pad_states: Any,
    skip: bool,
) -> HeadSettings:  # fmt: skip
    """Of a head for this task; those for spans answer for each token."""
    return HeadSettings(
        kind, width, *states, task.num_labels, adapter_width, "each" if task.is_span else tokens, task.num_tokens,
        pad_states, skip,
    )  # fmt: skip
