"""Dropout that does not hold up a CPU. Torch draws a number for each element there, on one core, and computes attention
with dropout in fp32, unfused: together a sixth of the step of a layer that trains. Here a draw of 64 bits serves four
elements, and attention stays in the type that comes in. On any other device both are torch's.

B batch, H heads, T tokens, E width of a head.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "mslt"  # its name in transformers' registry
_STEPS = 2**16  # a probability is one of so many parts


@torch.library.custom_op("mslt::dropout_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def dropout_mask(like: torch.Tensor, p: float) -> torch.Tensor:
    """What to multiply with, of the shape and type of `like`: 0 with probability `p`, taken to 1/65536, else such that
    the expectation is 1. From torch's generator; compiled code calls it, too, and so draws the same."""
    num_elements, dropped = like.numel(), round(p * _STEPS)
    bits = torch.empty(-(-num_elements // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    mask = torch.empty(like.shape, dtype=like.dtype)
    torch.ge(bits[:num_elements].view(like.shape), dropped - _STEPS // 2, out=mask)
    return mask.mul_(_STEPS / (_STEPS - dropped))


@dropout_mask.register_fake
def _(like: torch.Tensor, p: float) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _dropped(x: torch.Tensor, p: float) -> torch.Tensor:
    return x * dropout_mask(x.detach(), p)


class Dropout(nn.Dropout):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        return _dropped(x, self.p)


def attention(
    module: nn.Module,
    query_BHTE: torch.Tensor,
    key_BHTE: torch.Tensor,
    value_BHTE: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax attention as transformers calls it, [B, T, H, E] and no weights. `attention_mask` is True where a token
    may look, [B, 1, T, T]."""
    tensors = query_BHTE, key_BHTE, value_BHTE
    if not dropout or query_BHTE.device.type != "cpu":
        return sdpa_attention_forward(module, *tensors, attention_mask, dropout=dropout, scaling=scaling, **others)
    scores_BHTT = query_BHTE * scaling @ key_BHTE.transpose(2, 3)
    bias = torch.where(attention_mask, 0.0, torch.finfo(scores_BHTT.dtype).min).to(scores_BHTT.dtype)
    weights_BHTT = (scores_BHTT + bias).softmax(-1, dtype=torch.float32).to(value_BHTE.dtype)
    return (_dropped(weights_BHTT, dropout) @ value_BHTE).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def install(model: PreTrainedModel) -> None:
    """Give the model this dropout throughout, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p))
    model.set_attn_implementation(ATTENTION)
