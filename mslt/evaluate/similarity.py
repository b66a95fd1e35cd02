"""How alike the layers of two encoders are: where their heads look, and what their hidden states hold.

B batch, T tokens, N real tokens of a batch, H heads, L layers of the one and K of the other, D and E their widths.
"""

import math
from collections.abc import Sequence

import torch
from torch.special import entr


def js_distance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Square root of the Jensen-Shannon divergence in base 2 (Lin 1991; Endres and Schindelin 2003), in [0, 1], fp64.
    Distributions along the last axis; equal ones are exactly 0 apart."""
    entropies = [entr(r).sum(-1) for r in (p, q)]
    return _js_distance(p, q, *entropies)


def _js_distance(p: torch.Tensor, q: torch.Tensor, p_entropy: torch.Tensor, q_entropy: torch.Tensor) -> torch.Tensor:
    divergence = entr((p + q) / 2).sum(-1) - (p_entropy + q_entropy) / 2
    return (divergence / math.log(2)).clamp(0, 1).sqrt()


def js_sums(
    first_LBHTT: Sequence[torch.Tensor], second_KBHTT: Sequence[torch.Tensor], mask_BT: torch.Tensor
) -> torch.Tensor:
    """[L, K] fp64 on the CPU: distances between where the heads of two layers look, a head with the one of its index,
    averaged over heads and summed up over the tokens that are no padding."""
    others = [(q, entr(q).sum(-1)) for q in (_distributions(layer, mask_BT) for layer in second_KBHTT)]
    sums = torch.zeros(len(first_LBHTT), len(second_KBHTT), dtype=torch.float64)
    is_same = first_LBHTT is second_KBHTT
    for row, layer in enumerate(first_LBHTT):
        p_NHT = _distributions(layer, mask_BT)
        p_entropy_NH = entr(p_NHT).sum(-1)
        for column, (q_NHT, q_entropy_NH) in enumerate(others):
            if is_same and column < row:
                sums[row, column] = sums[column, row]
            else:
                sums[row, column] = _js_distance(p_NHT, q_NHT, p_entropy_NH, q_entropy_NH).mean(1).sum().item()
    return sums


def _distributions(attention_BHTT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """[N, H, T] fp64: of each real token, what sums up to 1 over real tokens."""
    mask_BT = mask_BT.to(attention_BHTT.device)
    p_NHT = (attention_BHTT.double() * mask_BT[:, None, None, :]).transpose(1, 2)[mask_BT]
    return p_NHT / p_NHT.sum(-1, keepdim=True)


class LinearCka:
    """Linear centred kernel alignment (Kornblith et al. 2019, arXiv:1905.00414, section 3) between all hidden states of
    one encoder and all of another, batch after batch: sums of products about the mean, in fp64, made up for the mean's
    way (Chan et al. 1983). Takes 8 L K D E bytes, however many the tokens: 0.8 GB for BERT-Base beside another."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._means: list[torch.Tensor] = []  # [L, D], [K, E]
        self._own: list[torch.Tensor] = []  # [L, D, D], [K, E, E]
        self._cross_LDKE = torch.empty(0)

    def add(
        self, first_LBTD: Sequence[torch.Tensor], second_KBTE: Sequence[torch.Tensor], mask_BT: torch.Tensor
    ) -> None:
        sides = [
            torch.stack([hidden[mask_BT.to(hidden.device)] for hidden in states]).double()
            for states in (first_LBTD, second_KBTE)
        ]  # [L, N, D], [K, N, E]
        num_new = sides[0].shape[1]
        means = [side.mean(1) for side in sides]
        if not self.num_tokens:
            self._means = [torch.zeros_like(mean) for mean in means]
            self._own = [mean.new_zeros(*mean.shape, mean.shape[-1]) for mean in means]
            self._cross_LDKE = means[0].new_zeros(means[0].numel(), means[1].numel())
        weight = self.num_tokens * num_new / (self.num_tokens + num_new)
        moved = [mean - before for mean, before in zip(means, self._means, strict=True)]
        for side, mean in zip(sides, means, strict=True):
            side -= mean[:, None, :]
        for own, side, way in zip(self._own, sides, moved, strict=True):
            own.baddbmm_(side.transpose(1, 2), side).baddbmm_(way[:, :, None], weight * way[:, None, :])
        flat = [side.transpose(0, 1).flatten(1) for side in sides]  # [N, L D], [N, K E]
        self._cross_LDKE.addmm_(flat[0].T, flat[1]).addr_(moved[0].flatten(), moved[1].flatten(), alpha=weight)
        self.num_tokens += num_new
        for before, way in zip(self._means, moved, strict=True):
            before += way * (num_new / self.num_tokens)

    def values(self) -> torch.Tensor:
        """[L, K] on the CPU, in [0, 1]; not a number where a hidden state does not vary."""
        (_, D), (K, E) = (mean.shape for mean in self._means)
        cross_LK = torch.stack([rows.view(D, K, E).square().sum((0, 2)) for rows in self._cross_LDKE.split(D)])
        norms = [own.flatten(1).norm(dim=1) for own in self._own]
        return (cross_LK / norms[0][:, None] / norms[1]).cpu()

    def of_noise(self) -> float:
        """What states of white noise, of these widths and without anything in common, would show on so many tokens: the
        expectations of |X'Y|² and |X'X|² are N D E and N D (N + D)."""
        D, E = (mean.shape[-1] for mean in self._means)
        return math.sqrt(D * E / (self.num_tokens + D) / (self.num_tokens + E))
