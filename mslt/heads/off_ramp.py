"""Off-ramps: a small classifier behind each layer but the last (Xin et al. 2020, arXiv:2004.12993, section 3.1).

B batch, T tokens, D width, C labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from mslt.errors import MsltError
from mslt.models import families

Pooling = Literal["cls", "mean"]
Initial = Literal["finetuned", "pretrained", "stages", "random"]


@dataclass(frozen=True)
class RampOptions:
    """`initial` is where the ramps' first matrix came from: the fine-tuned model's own pooler, one from before the
    fine-tuning, those of a run's stages, or none. `pooling` is what of a layer's output they read: the first token, or
    the mean over tokens."""

    initial: Initial = "finetuned"
    pooling: Pooling = "cls"


class OffRamp(nn.Module):
    """D → D, the activation of the model's own head, dropout, D → C."""

    def __init__(
        self,
        width: int,
        num_labels: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
        dropout: float,
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, num_labels)

    def forward(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """[B, C]."""
        a_BD = self.activation(self.dense(pooled_BD))
        return self.output(self.dropout(a_BD) if self.dropout.training else a_BD)  # a call less is 15 µs of a row


def pool(h_BTD: torch.Tensor, attention_mask_BT: torch.Tensor | None, pooling: Pooling) -> torch.Tensor:
    """What ramps read of a layer's output, [B, D] in its type: the first token, or the mean of those that are no
    padding. No mask is a mask of ones, to the bit. The mean is summed up in fp32: autocast would lower a matrix
    product, a product and a sum stay."""
    if pooling == "cls":
        return h_BTD[:, 0]
    if attention_mask_BT is None:
        return (h_BTD.float() * (1 / h_BTD.shape[1])).sum(1).to(h_BTD.dtype)
    weights_BT = attention_mask_BT.float()
    weights_BT = weights_BT / weights_BT.sum(1, keepdim=True)
    return (h_BTD.float() * weights_BT[:, :, None]).sum(1).to(h_BTD.dtype)


def new_ramps(model: PreTrainedModel, seed: int) -> nn.ModuleList:
    """A ramp for each layer but the last, on the model's device and in its type, drawn as the model draws its own:
    N(0, initializer_range), biases 0. MsltError for a model of one layer."""
    config = model.config
    if config.num_hidden_layers < 2:
        raise MsltError(f"{config.num_hidden_layers} layer: there is none to leave behind; take a model of 2 or more")
    dropout = config.hidden_dropout_prob
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ramps = nn.ModuleList(
            OffRamp(config.hidden_size, config.num_labels, families.pooler_activation(config), dropout)
            for _ in range(config.num_hidden_layers - 1)
        )
        for part in ramps.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=config.initializer_range)
                nn.init.zeros_(part.bias)
    return ramps.to(model.device, model.dtype)


@torch.no_grad()
def copy_pooler(ramp: OffRamp, source: PreTrainedModel) -> None:
    """Begin from the pooler of `source`, in place. MsltError where it has none of that width."""
    pooler = families.pooler_of(source)
    if pooler is None or pooler.weight.shape != ramp.dense.weight.shape:
        has = "no pooler" if pooler is None else f"a pooler of width {pooler.weight.shape[0]}"
        raise MsltError(
            f"{source.name_or_path}: has {has}, the ramps are {ramp.dense.weight.shape[0]} wide; begin from the "
            "fine-tuned one or at random"
        )
    ramp.dense.weight.copy_(pooler.weight)
    ramp.dense.bias.copy_(pooler.bias)
