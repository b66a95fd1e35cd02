"""The engine's oracle: the same stage in plain torch, one process, the whole global batch at once."""

from torch.nn.utils import clip_grad_norm_

from mslt.data.loader import Samples
from mslt.engine.optimizer import make_optimizer
from mslt.models import factory
from mslt.models.forward import SUMS, PretrainingLoss
from mslt.models.freezing import freeze
from mslt.models.surgery import State
from mslt.plan import Plan
from mslt.schedule import lr_at


def train_plainly(plan: Plan, stage_index: int, base: State, samples: Samples, steps: int) -> State:
    """Weights after `steps` steps of the stage: the full graph, mean losses of the batch, torch's own clipping."""
    stage = plan.stages[stage_index]
    model = factory.build(plan.model, stage.depth, base)
    freeze(model, stage.trainable)
    module = PretrainingLoss(model).train()
    optimizer = make_optimizer(module, plan.optimizer)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(stage, step)
        first = stage.first_sample + step * stage.batch_size
        sums = dict(zip(SUMS, module(**samples.batch(range(first, first + stage.batch_size))), strict=True))
        loss = sums["mlm_loss"] / sums["mlm_count"] + sums["nsp_loss"] / sums["nsp_count"]
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_([p for p in model.parameters() if p.requires_grad], plan.clip_norm)
        optimizer.step()
    return {name: tensor.clone() for name, tensor in factory.own_state(model).items()}
