"""The pretraining loss: MLM on the masked positions alone, plus NSP where samples are pairs.

B batch, T tokens, D width, M masked positions (padded), V vocabulary.
"""

from collections import deque
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel

from mslt.models import families
from mslt.models.freezing import still_dropout
from mslt.models.layer_stack import iter_hidden, iter_layers
from mslt.models.loss import head_sums

# What a forward pass sums up over its samples, so that ranks and micro-batches add. The order of `PretrainingLoss`.
SUMS = ("mlm_loss", "mlm_correct", "mlm_count", "nsp_loss", "nsp_correct", "nsp_count")


def means(sums: torch.Tensor) -> dict[str, float]:
    """Means and accuracies of SUMS, as a record's fields; none of a head that predicted nothing."""
    by_name = dict(zip(SUMS, sums.double().tolist(), strict=True))
    found = {}
    for head in ("mlm", "nsp"):
        if count := by_name[f"{head}_count"]:
            found[f"{head}_loss"] = by_name[f"{head}_loss"] / count
            found[f"{head}_accuracy"] = by_name[f"{head}_correct"] / count
    return found


class PretrainingLoss(nn.Module):
    """Hugging Face's pretraining model with a forward that gathers before the MLM head and sums instead of averaging.

    `lowest_graph_layer` is the plan's boundary. `still` names the slots whose dropout stays off in training. Without
    `next_sentence_prediction` pooler and NSP head are not computed, and the NSP sums are 0. `autocast` is the type of
    matrix products, None for fp32; losses are computed in fp32.

    What lies below the boundary may be computed on its own by `prefix`, ahead of time, and handed to `forward`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lowest_graph_layer: int = -1,
        still: tuple[str, ...] = (),
        next_sentence_prediction: bool = True,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.lowest_graph_layer = lowest_graph_layer
        self.still = still
        self.next_sentence_prediction = next_sentence_prediction
        self.autocast = autocast

    def train(self, mode: bool = True) -> "PretrainingLoss":
        super().train(mode)
        still_dropout(self.model, self.still)
        return self

    @torch.no_grad()
    def prefix(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Hidden state `lowest_graph_layer`, [B, T, D]: all that is computed without a graph."""
        with self._precision(input_ids.device):
            walk = iter_hidden(self.model, input_ids, token_type_ids, attention_mask)
            return next(h_BTD for k, h_BTD in walk if k == self.lowest_graph_layer)

    def _precision(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def forward(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        mlm_positions: torch.Tensor,
        mlm_labels: torch.Tensor,
        nsp_labels: torch.Tensor,
        prefix_BTD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[6] fp32, named by SUMS. ids, types and mask [B, T]; positions and labels [B, M]; NSP labels [B]."""
        lowest = self.lowest_graph_layer
        with self._precision(input_ids.device):
            if prefix_BTD is None:
                walk = iter_hidden(self.model, input_ids, token_type_ids, attention_mask, lowest)
            else:
                walk = chain([(lowest, prefix_BTD)], iter_layers(self.model, prefix_BTD, attention_mask, lowest))
            ((_, h_BTD),) = deque(walk, maxlen=1)
            h_BMD = h_BTD.gather(1, mlm_positions[:, :, None].expand(-1, -1, h_BTD.shape[-1]))
            sums = head_sums(families.mlm_logits(self.model, h_BMD).flatten(0, 1), mlm_labels.flatten())
            if self.next_sentence_prediction:
                nsp_sums = head_sums(families.nsp_logits(self.model, h_BTD), nsp_labels)
            else:
                nsp_sums = torch.zeros_like(sums)
        return torch.cat([sums, nsp_sums])
