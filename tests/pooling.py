"""Small encoders and heads on their hidden states."""

from typing import Any

import torch
from transformers import PreTrainedModel

from mslt.heads.pooling import HeadSettings, PoolingHead
from mslt.models.layer_stack import iter_hidden

D, L = 32, 5  # of tests.exits.classifier: four layers and the embeddings


def settings(**changes: Any) -> HeadSettings:
    return HeadSettings(**{"kind": "adapter", "width": D, "first_state": 0, "last_state": L - 1, "num_labels": 2,
                           "adapter_width": 3, "num_tokens": 20, **changes})  # fmt: skip


def head(seed: int = 0, **changes: Any) -> PoolingHead:
    torch.manual_seed(seed)
    return PoolingHead(settings(**changes)).eval()


@torch.no_grad()
def states(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[L, B, T, D]."""
    walk = iter_hidden(model, inputs["input_ids"], inputs.get("token_type_ids"), inputs["attention_mask"])
    return torch.stack([h for _, h in walk])


def packed(h_LBTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """[N, L, D]."""
    return h_LBTD.permute(1, 2, 0, 3)[mask_BT]
