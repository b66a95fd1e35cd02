"""Freezing by slots, before an engine sees the model (a living optimizer is never edited)."""

import torch
from torch import nn
from transformers import PreTrainedModel

from mslt.models import families


def freeze(model: PreTrainedModel, trainable: tuple[str, ...]) -> None:
    """Set requires_grad of every parameter by the slot it belongs to, in place. A tied weight belongs to
    `embeddings`, so the MLM decoder is frozen with them."""
    family = families.family_of(model.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(families.slot_of(family, name) in trainable)


def still_dropout(model: PreTrainedModel, frozen: tuple[str, ...]) -> None:
    """Put frozen slots into evaluation mode: their output no longer varies from step to step."""
    modules: dict[str, nn.Module] = families.slot_modules(model)
    for slot in frozen:
        modules[slot].eval()


def hold_in(model: PreTrainedModel, frozen: tuple[str, ...], dtype: torch.dtype) -> None:
    """Hold the matrix products' weights of frozen layers in `dtype`, in place, where autocast would cast them in every
    pass: the same bits come out. LayerNorm and embeddings, which it computes in fp32, stay."""
    modules = families.slot_modules(model)
    for slot in frozen:
        if slot.startswith("layer."):
            for part in modules[slot].modules():
                if isinstance(part, nn.Linear):
                    part.to(dtype)
