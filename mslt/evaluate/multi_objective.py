"""Fine-tuning beside masked words: some samples of each batch are read back from embeddings that are half hidden, the
others classified ("The convexity of BERT"). With an extra layer on top, which takes over what the last layer does for
its words, and is left out afterwards: what is trained is the classifier as it was opened.

B batch, T tokens, D width, M hidden tokens, V vocabulary.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from mslt.evaluate.fine_tune import Part
from mslt.evaluate.mlm_probe import HeadInit, pretrained_head
from mslt.heads.mlm_head import MlmHead, new_mlm_head, without_components
from mslt.models import families
from mslt.models.layer_stack import iter_layers, run_layer
from mslt.models.loss import head_sums


@dataclass(frozen=True)
class MultiObjective:
    """`mlm_share` is the probability of a sample to go to the words, `mlm_weight` that of their loss (λ). What the
    paper does not give has our defaults; `dropout` and `chosen_share` are those of its probe. `extra_layer` begins
    as a copy of the last. A head that is drawn learns at a rate of its own, that of its probe."""

    extra_layer: bool = False
    head: HeadInit = "pretrained"
    mlm_share: float = 0.5
    mlm_weight: float = 1.0
    dropout: float = 0.3
    chosen_share: float = 0.15
    drawn_head_rate: float = 1e-3


class MultiObjectiveModel(nn.Module):
    """`model` is the classifier; in evaluation this is it, and nothing else. Draws are torch's, as dropout's are."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: MlmHead,
        extra: nn.Module | None,
        is_special_V: torch.Tensor,
        settings: MultiObjective,
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.extra = extra
        self.register_buffer("is_special_V", is_special_V, persistent=False)
        self.settings = settings

    @property
    def device(self) -> torch.device:
        return self.model.device

    def parts(self, learning_rate: float) -> list[Part]:
        """What is clipped apart, so that the words do not shorten the classifier's gradient by more than is theirs."""
        head_rate = self.settings.drawn_head_rate if self.settings.head == "random" else learning_rate
        extra = [] if self.extra is None else [Part(self.extra, learning_rate)]
        return [Part(self.model, learning_rate), *extra, Part(self.head, head_rate)]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """ids, mask and types [B, T], labels [B]. In training the loss alone."""
        if not self.training or labels is None:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            return self.model(input_ids, attention_mask=attention_mask, labels=labels, **types)
        is_mlm_B, chosen_BT = self._drawn(input_ids, attention_mask)
        words = families.words_of(self.model)
        dropped_ME = torch.rand(int(chosen_BT.sum()), words.embedding_dim, device=self.device) < self.settings.dropout
        words_BTE = without_components(words(input_ids), chosen_BT, dropped_ME)
        h_BTD = families.embed(self.model, input_ids, token_type_ids, words_BTE)
        ((_, h_BTD),) = deque(iter_layers(self.model, h_BTD, attention_mask, 0), maxlen=1)
        loss = self._class_loss(h_BTD[~is_mlm_B], labels[~is_mlm_B])
        if chosen_BT.any():
            top_BTD = h_BTD[is_mlm_B]
            if self.extra is not None:
                top_BTD = run_layer(self.model, self.extra, top_BTD, attention_mask[is_mlm_B])
            labels_M = input_ids[chosen_BT]
            logits_MV = self.head(top_BTD[chosen_BT[is_mlm_B]], words.weight)
            loss = loss + self.settings.mlm_weight * head_sums(logits_MV, labels_M)[0] / len(labels_M)
        return SequenceClassifierOutput(loss=loss)

    def _drawn(self, input_ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which samples go to the words [B], and which of their tokens are hidden [B, T]."""
        is_mlm_B = torch.rand(len(input_ids_BT), device=self.device) < self.settings.mlm_share
        draw_BT = torch.rand(input_ids_BT.shape, device=self.device)
        may_BT = mask_BT.bool() & ~self.is_special_V[input_ids_BT]  # type: ignore[index]
        return is_mlm_B, (draw_BT < self.settings.chosen_share) & may_BT & is_mlm_B[:, None]

    def _class_loss(self, h_BTD: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        """A mean over the samples, 0 of none."""
        if not len(labels_B):
            return h_BTD.sum()  # of nothing
        logits_BC = families.class_logits(self.model, h_BTD).float()
        return mse_loss(logits_BC[:, 0], labels_B) if logits_BC.shape[1] == 1 else cross_entropy(logits_BC, labels_B)


def multi_objective_model(
    model: PreTrainedModel, source: str, tokenizer: PreTrainedTokenizerBase, settings: MultiObjective, seed: int
) -> MultiObjectiveModel:
    """The classifier under both objectives. MsltError where the checkpoint `source` has no MLM head to begin from."""
    head = new_mlm_head(model, seed)
    if settings.head == "pretrained":
        head.load_state_dict(pretrained_head(source))
    is_special_V = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    is_special_V[tokenizer.all_special_ids] = True
    extra = families.copy_of_top(model) if settings.extra_layer else None
    return MultiObjectiveModel(model, head, extra, is_special_V, settings).to(model.device)
