"""The pretraining loss: MLM on the masked positions alone, plus NSP.

B batch, T tokens, D width, M masked positions (padded), V vocabulary.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from mslt.models import families
from mslt.models.freezing import still_dropout
from mslt.models.layer_stack import last_hidden

# What a forward pass sums up over its samples, so that ranks and micro-batches add. The order of `PretrainingLoss`.
SUMS = ("mlm_loss", "mlm_correct", "mlm_count", "nsp_loss", "nsp_correct", "nsp_count")


class PretrainingLoss(nn.Module):
    """Hugging Face's pretraining model with a forward that gathers before the MLM head and sums instead of averaging.

    `lowest_graph_layer` is the plan's boundary. `still` names the slots whose dropout stays off in training.
    """

    def __init__(self, model: PreTrainedModel, lowest_graph_layer: int = -1, still: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.model = model
        self.lowest_graph_layer = lowest_graph_layer
        self.still = still

    def train(self, mode: bool = True) -> "PretrainingLoss":
        super().train(mode)
        still_dropout(self.model, self.still)
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        mlm_positions: torch.Tensor,
        mlm_labels: torch.Tensor,
        nsp_labels: torch.Tensor,
    ) -> torch.Tensor:
        """[6] fp32, named by SUMS. ids, types and mask [B, T]; positions and labels [B, M]; NSP labels [B]."""
        h_BTD = last_hidden(self.model, input_ids, token_type_ids, attention_mask, self.lowest_graph_layer)
        h_BMD = h_BTD.gather(1, mlm_positions[:, :, None].expand(-1, -1, h_BTD.shape[-1]))
        mlm_logits_BMV = families.mlm_logits(self.model, h_BMD).float()
        nsp_logits_B2 = families.nsp_logits(self.model, h_BTD).float()
        mlm_loss = cross_entropy(mlm_logits_BMV.flatten(0, 1), mlm_labels.flatten(), reduction="sum")
        nsp_loss = cross_entropy(nsp_logits_B2, nsp_labels, reduction="sum")
        counts = (
            (mlm_logits_BMV.argmax(-1) == mlm_labels).sum(),
            (mlm_labels >= 0).sum(),
            (nsp_logits_B2.argmax(-1) == nsp_labels).sum(),
            torch.full((), len(nsp_labels), device=nsp_loss.device),
        )
        mlm_correct, mlm_count, nsp_correct, nsp_count = (count.float() for count in counts)
        return torch.stack([mlm_loss, mlm_correct, mlm_count, nsp_loss, nsp_correct, nsp_count])
