"""The engine's oracle: the same stage in plain torch, one process, the whole global batch at once."""

from collections.abc import Collection, Iterable

import torch
from torch.nn.utils import clip_grad_norm_

from mslt.data.loader import Samples
from mslt.models import factory
from mslt.models.forward import SUMS, PretrainingLoss
from mslt.models.freezing import freeze
from mslt.models.surgery import State
from mslt.plan import Plan
from mslt.schedule import lr_at


class PlainLamb(torch.optim.Optimizer):
    """LAMB (arXiv:1904.00962, algorithm 2) as in any library: one ratio for each tensor that it is given. Exact for
    whole parameters; under ZeRO it is given flat partitions, and wrong."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["step"] += 1
                state["m"].lerp_(p.grad, 1 - 0.9)
                state["v"].mul_(0.999).addcmul_(p.grad, p.grad, value=1 - 0.999)
                m, v = state["m"] / (1 - 0.9 ** state["step"]), state["v"] / (1 - 0.999 ** state["step"])
                update = m / (v.sqrt() + 1e-6) + group["weight_decay"] * p
                ratio = (p.norm() / update.norm()).item() if group["adapt"] else 1.0
                p.add_(update, alpha=-group["lr"] * ratio)


def plain_lamb(parameters: Iterable[torch.nn.Parameter], plan: Plan) -> PlainLamb:
    """For the trainable parameters: matrices decay and adapt, vectors do neither."""
    assert (plan.optimizer.name, plan.optimizer.beta1, plan.optimizer.beta2) == ("lamb", 0.9, 0.999)
    trainable = [p for p in parameters if p.requires_grad]
    matrices = {"params": [p for p in trainable if p.ndim > 1], "weight_decay": plan.optimizer.weight_decay}
    vectors = {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}
    return PlainLamb([{**matrices, "adapt": True}, {**vectors, "adapt": False}], {"lr": plan.optimizer.learning_rate})


def train_plainly(
    plan: Plan,
    stage_index: int,
    base: State,
    samples: Samples,
    steps: Collection[int],
    micro_batch_size: int | None = None,
) -> list[State]:
    """Weights after each of these numbers of steps: the full graph, mean losses of the batch, torch's own clipping.
    The batch at once, or in parts whose gradients add up."""
    stage = plan.stages[stage_index]
    model = factory.build(plan.model, stage.depth, base)
    freeze(model, stage.trainable)
    module = PretrainingLoss(model).train()
    optimizer = plain_lamb(model.parameters(), plan)
    states = []
    for step in range(max(steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(stage, step)
        first = stage.first_sample + step * stage.batch_size
        batch = samples.batch(range(first, first + stage.batch_size))
        masked = (batch["mlm_labels"] >= 0).sum()
        optimizer.zero_grad()
        for part in zip(*(t.split(micro_batch_size or stage.batch_size) for t in batch.values()), strict=True):
            sums = dict(zip(SUMS, module(**dict(zip(batch, part, strict=True))), strict=True))
            (sums["mlm_loss"] / masked + sums["nsp_loss"] / stage.batch_size).backward()
        clip_grad_norm_([p for p in model.parameters() if p.requires_grad], plan.clip_norm)
        optimizer.step()
        if step + 1 in steps:
            states.append({name: tensor.clone() for name, tensor in factory.own_state(model).items()})
    return states
