"""Fine-tuning a model with a head: a loop of a page, the same for every task (Devlin et al. 2019, appendix A.3)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from mslt.data import keyed

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Row = TypeVar("Row")
Batch = dict[str, torch.Tensor]
Tell = Callable[[str, int, int], None]  # what is being done, how much of it is, and of how much
MAX_NORM = 1.0


@dataclass(frozen=True)
class FineTuning:
    """AdamW, linear warm-up over `warmup_share` of the steps, linear decay to 0; biases and norms without weight
    decay. `precision` is of matrix products: fp32, bf16, fp16."""

    learning_rate: float
    batch_size: int
    num_epochs: int
    seed: int
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    precision: str = "fp32"


@dataclass(frozen=True)
class Part:
    """What trains at its own rate, and is clipped by its own norm, in a pass that it shares."""

    module: nn.Module
    learning_rate: float


def fine_tune(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], Batch],
    settings: FineTuning,
    parts: Sequence[Part] = (),
    looks: int = 1,
) -> Iterator[float]:
    """Train in place, on the device the model is on; yields the number of epochs done, after each or, with `looks`, so
    many times in each. `collate` makes a batch with labels. The order of rows and dropout are keyed by the seed.
    `parts` of the model have their own rates and norms; without them the whole has one."""
    groups, clipped = [], []
    for part in parts or [Part(model, settings.learning_rate)]:
        decays = [p for p in part.module.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in part.module.parameters() if p.requires_grad and p.ndim <= 1]
        for parameters, decay in ((decays, settings.weight_decay), (others, 0.0)):
            groups.append({"params": parameters, "weight_decay": decay, "lr": part.learning_rate})
        clipped.append([*decays, *others])
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, eps=1e-8, fused=True)
    steps = num_steps(len(rows), settings)
    steps_per_epoch = steps // settings.num_epochs
    schedule = get_linear_schedule_with_warmup(optimizer, round(settings.warmup_share * steps), steps)
    scaler = torch.amp.GradScaler(model.device.type, enabled=settings.precision == "fp16")
    pauses = {steps_per_epoch * look // looks for look in range(1, looks)} - {0}
    for epoch in range(settings.num_epochs):
        model.train()
        torch.manual_seed(keyed.torch_seed(settings.seed, "dropout", epoch))
        order = np.argsort(keyed.bits(settings.seed, "fine_tune_order", epoch, np.arange(len(rows))), kind="stable")
        for step, first in enumerate(range(0, len(rows), settings.batch_size)):
            if step in pauses:
                yield epoch + step / steps_per_epoch
                model.train()
            batch = collate([rows[index] for index in order[first : first + settings.batch_size]])
            with autocast(model, settings.precision):
                loss = model(**_on_device(batch, model)).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            for parameters in clipped:
                nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        yield epoch + 1


def num_steps(num_rows: int, settings: FineTuning) -> int:
    return -(-num_rows // settings.batch_size) * settings.num_epochs


def counted(
    collate: Callable[[Sequence[Row]], Batch], doing: str, total: int, tell: Tell
) -> Callable[[Sequence[Row]], Batch]:
    """The same `collate`, which tells of every batch."""
    numbers = iter(range(1, total + 1))

    def telling(rows: Sequence[Row]) -> Batch:
        tell(doing, next(numbers), total)
        return collate(rows)

    return telling


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], Batch],
    batch_size: int,
    precision: str,
    length: Callable[[Row], int],
) -> list[Any]:
    """What the model says of each row, in the order of the rows: a tuple with its outputs, fp32 on the CPU. Rows of
    like `length` share a batch."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: length(rows[index]))
    said: list[Any] = [None] * len(rows)
    for first in range(0, len(rows), batch_size):
        indices = order[first : first + batch_size]
        batch = collate([rows[index] for index in indices])
        with autocast(model, precision):
            outputs = model(**_on_device(batch, model))
        columns = [value.float().cpu() for name, value in outputs.items() if name != "loss"]
        for index, *values in zip(indices, *columns, strict=True):
            said[index] = tuple(values)
    return said


def autocast(model: PreTrainedModel, precision: str) -> torch.autocast:
    """Matrix products in bf16 or fp16, or with fp32 as they are."""
    dtype = PRECISIONS[precision]
    return torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None)


def _on_device(batch: Batch, model: PreTrainedModel) -> Batch:
    return {name: tensor.to(model.device, non_blocking=True) for name, tensor in batch.items()}
