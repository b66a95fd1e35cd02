"""Reading the input word back from any hidden state ("The convexity of BERT"): an MLM head on frozen word embeddings,
and what hides words from it.

B batch, T tokens, D width, E width of the word embeddings, M chosen tokens, V vocabulary.
"""

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PretrainedConfig, PreTrainedModel

from mslt.data import keyed
from mslt.models import families


class MlmHead(nn.Module):
    """D → E, the activation of the model's own head, LayerNorm, then the word embeddings, which are not its own, and a
    bias [V]: D·E + E + 2E + V parameters."""

    def __init__(self, config: PretrainedConfig, embedding_width: int, seed: int) -> None:
        """Drawn as the model draws its own, N(0, initializer_range), alike for one seed."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed.torch_seed(seed, "mlm_head"))
            self.dense = nn.Linear(config.hidden_size, embedding_width)
            nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)
        self.activation = families.mlm_activation(config)
        self.norm = nn.LayerNorm(embedding_width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, h_MD: torch.Tensor, words_VE: torch.Tensor) -> torch.Tensor:
        """[M, V]."""
        return linear(self.norm(self.activation(self.dense(h_MD))), words_VE, self.bias)


def new_mlm_head(model: PreTrainedModel, seed: int) -> MlmHead:
    """For any hidden state of `model`, on its device."""
    return MlmHead(model.config, families.words_of(model).embedding_dim, seed).to(model.device)


def without_components(words_BTE: torch.Tensor, chosen_BT: torch.Tensor, dropped_ME: torch.Tensor) -> torch.Tensor:
    """Embedding dropout: of the chosen tokens, in their order, the dropped components are 0, the others as they are."""
    words_BTE = words_BTE.clone()
    words_BTE[chosen_BT] = words_BTE[chosen_BT].masked_fill(dropped_ME, 0.0)
    return words_BTE
