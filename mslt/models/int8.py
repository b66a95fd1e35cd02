"""Frozen layers in 8-bit integers: weights once, with a scale for each output channel; what goes in anew in each pass,
with a range for each token. (The scheme of Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, section 2.2, with a
range that need not lie around 0, and without its exceptions.) No gradient passes through.

M tokens, K features in, N features out.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from mslt.models import families

_TINY = 1e-12  # a row that is one number throughout has no range


class Int8Linear(nn.Module):
    """A frozen nn.Linear. A token's result depends on no other token, so neither on the batch."""

    weight_NK: torch.Tensor
    scale_N: torch.Tensor
    sum_N: torch.Tensor
    bias_N: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        w_NK = linear.weight.detach().float()
        scale_N = w_NK.abs().amax(1).clamp(min=_TINY) / 127
        w_int8_NK = (w_NK / scale_N[:, None]).round().to(torch.int8)
        self.register_buffer("weight_NK", w_int8_NK, persistent=False)
        self.register_buffer("scale_N", scale_N, persistent=False)
        self.register_buffer("sum_N", w_int8_NK.sum(1, dtype=torch.int32) * scale_N, persistent=False)
        self.register_buffer("bias_N", linear.bias.detach().float(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, K] → […, N], in autocast's type where that is on, else in the type that comes in."""
        x_MK = x.flatten(0, -2).float()
        low_M1, high_M1 = x_MK.amin(1, keepdim=True), x_MK.amax(1, keepdim=True)
        scale_M1, middle_M1 = (high_M1 - low_M1).clamp(min=_TINY) / 255, (high_M1 + low_M1) / 2
        x_int8_MK = ((x_MK - middle_M1) / scale_M1).round().clamp(-128, 127).to(torch.int8)
        y_MN = torch._int_mm(x_int8_MK, self.weight_NK.t()).float() * scale_M1 * self.scale_N
        y_MN = y_MN + middle_M1 * self.sum_N + self.bias_N
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return y_MN.to(dtype).unflatten(0, x.shape[:-1])


def quantize_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Replace the matrix products of the bottom layers by Int8Linear, in place."""
    for index in range(num_layers):
        layer = families.slot_modules(model)[f"layer.{index}"]
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
