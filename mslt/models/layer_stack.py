"""The one walker: embeddings, then layer after layer. Training, probing, pooling and early exit all read this.

B batch, T tokens, D width. Hidden state 0 is the embedding output, hidden state k+1 the output of layer k.
"""

from collections import deque
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from mslt.models import families


def iter_hidden(
    model: PreTrainedModel,
    input_ids_BT: torch.Tensor,
    token_type_ids_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor,
    lowest_graph_layer: int = -1,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (k, h_k [B, T, D]) in order, each computed when it is asked for.

    Hidden states up to `lowest_graph_layer` are computed without a graph (see plan.lowest_graph_layer). Bit-equal to
    the model's own forward for sdpa and eager attention.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and lowest_graph_layer < 0):
        h_BTD = families.embed(model, input_ids_BT, token_type_ids_BT)
    mask = create_bidirectional_mask(config=model.config, inputs_embeds=h_BTD, attention_mask=attention_mask_BT)
    yield 0, h_BTD
    for index, layer in enumerate(families.layers(model)):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= lowest_graph_layer):
            h_BTD = layer(h_BTD, mask)
        yield index + 1, h_BTD


def last_hidden(
    model: PreTrainedModel,
    input_ids_BT: torch.Tensor,
    token_type_ids_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor,
    lowest_graph_layer: int = -1,
) -> torch.Tensor:
    """The output of the top layer, [B, T, D]."""
    walk = iter_hidden(model, input_ids_BT, token_type_ids_BT, attention_mask_BT, lowest_graph_layer)
    ((_, h_BTD),) = deque(walk, maxlen=1)
    return h_BTD
