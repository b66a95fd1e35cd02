"""The one walker: embeddings, then layer after layer, of BERT, RoBERTa and ELECTRA under any head. Training, probing,
pooling and early exit all read this.

B batch, T tokens, D width. Hidden state 0 is the embedding output, hidden state k+1 the output of layer k.
"""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from mslt.models import dropout, families


def iter_hidden(
    model: PreTrainedModel,
    input_ids_BT: torch.Tensor,
    token_type_ids_BT: torch.Tensor | None,
    attention_mask_BT: torch.Tensor | None,
    lowest_graph_layer: int = -1,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (k, h_k [B, T, D]) in order, each computed when it is asked for.

    Without a mask no token is padding. Hidden states up to `lowest_graph_layer` are computed without a graph (see
    plan.lowest_graph_layer). Bit-equal to the model's own forward for sdpa and eager attention.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and lowest_graph_layer < 0):
        h_BTD = families.embed(model, input_ids_BT, token_type_ids_BT)
    yield 0, h_BTD
    yield from iter_layers(model, h_BTD, attention_mask_BT, 0, lowest_graph_layer)


def iter_layers(
    model: PreTrainedModel,
    h_BTD: torch.Tensor,
    attention_mask_BT: torch.Tensor | None,
    first_index: int,
    lowest_graph_layer: int = -1,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Go on from hidden state `first_index`: yield (k, h_k [B, T, D]) of the layers from that one to the top."""
    mask = None if attention_mask_BT is None else _attention_mask(model, h_BTD, attention_mask_BT)
    for index, layer in islice(enumerate(families.layers(model)), first_index, None):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= lowest_graph_layer):
            h_BTD = layer(h_BTD, mask)
        yield index + 1, h_BTD


def run_layer(
    model: PreTrainedModel, layer: nn.Module, h_BTD: torch.Tensor, attention_mask_BT: torch.Tensor | None
) -> torch.Tensor:
    """[B, T, D]: one more layer, which is not the model's."""
    mask = None if attention_mask_BT is None else _attention_mask(model, h_BTD, attention_mask_BT)
    return layer(h_BTD, mask)


def _attention_mask(model: PreTrainedModel, h_BTD: torch.Tensor, attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """What the layers are handed. For sdpa and our own always a mask: Hugging Face's leaves one out that hides nothing,
    and has to wait for the device to know."""
    if model.config._attn_implementation in ("sdpa", dropout.ATTENTION):
        B, T = attention_mask_BT.shape
        return attention_mask_BT.bool()[:, None, None, :].expand(B, 1, T, T)
    return create_bidirectional_mask(config=model.config, inputs_embeds=h_BTD, attention_mask=attention_mask_BT)
