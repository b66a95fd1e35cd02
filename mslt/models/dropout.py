"""Dropout that does not hold up a CPU. Torch draws a number for each element there, on one core (but for Intel's), and
computes attention with dropout in fp32, unfused: together a sixth of the step of a layer that trains. Here a draw of 64
bits serves four elements, and attention stays in the type that comes in. On any other device both are torch's.

B batch, H heads, T tokens, E width of a head.
"""

from typing import Any

import torch
from torch import library, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "mslt"  # its name in transformers' registry
_STEPS = 2**16  # a probability is one of so many parts


# Compiled code calls it, too, and so draws the same: once for each `like`, in the order in which they come to be.
@library.custom_op("mslt::keep_mask", mutates_args=(), device_types="cpu", tags=(torch.Tag.nondeterministic_seeded,))
def keep_mask(like: torch.Tensor, p: float) -> torch.Tensor:
    """0 with probability `p`, taken to 1/65536, else 1, of the shape and type of `like`. From torch's generator."""
    num_elements = like.numel()
    bits = torch.empty(-(-num_elements // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    mask = torch.empty(like.shape, dtype=like.dtype)
    return torch.ge(bits[:num_elements].view(like.shape), _dropped(p) - _STEPS // 2, out=mask)


@keep_mask.register_fake
def _(like: torch.Tensor, p: float) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _dropped(p: float) -> int:
    """How many of _STEPS; one at least is kept."""
    return min(round(p * _STEPS), _STEPS - 1)


def scale(p: float) -> float:
    """Of what is kept, so that the expectation stays."""
    return _STEPS / (_STEPS - _dropped(p))


class Dropout(nn.Dropout):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape. In bf16 the scale is rounded like torch's: 0.16 % low at p = 0.1."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        return x * keep_mask(x.detach(), self.p).mul_(scale(self.p))


def attention(
    module: nn.Module,
    query_BHTE: torch.Tensor,
    key_BHTE: torch.Tensor,
    value_BHTE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax attention as transformers calls it, [B, T, H, E] and no weights. `attention_mask` is True where a token
    may look, [B, 1, T, T]. Torch's wherever it is fast, or something else is asked for."""
    tensors = query_BHTE, key_BHTE, value_BHTE
    asks_for_more = any(value is not None for value in others.values())
    if not dropout or query_BHTE.device.type != "cpu" or attention_mask is None or asks_for_more:
        return sdpa_attention_forward(module, *tensors, attention_mask, dropout=dropout, scaling=scaling, **others)
    scores_BHTT = query_BHTE * scaling @ key_BHTE.transpose(2, 3)
    bias = torch.where(attention_mask, 0.0, torch.finfo(scores_BHTT.dtype).min).to(scores_BHTT.dtype)
    weights_BHTT = (scores_BHTT + bias).softmax(-1, dtype=torch.float32).to(value_BHTE.dtype)
    kept_BHTT = weights_BHTT * keep_mask(weights_BHTT.detach(), dropout)
    return (kept_BHTT @ (value_BHTE * scale(dropout))).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def install(model: PreTrainedModel) -> None:
    """Give the model this dropout throughout, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))
    model.set_attn_implementation(ATTENTION)
