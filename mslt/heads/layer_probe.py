"""Probes: a small classifier on each frozen hidden state, all of them trained together, each as if it were alone.

The classifier and its search are SentEval's (Conneau and Kiela 2018, arXiv:1803.05449), as in its
`tools/classifier.py` and `tools/validation.py`: one sigmoid layer or none, Adam with coupled L2, dev accuracy after
every 4 epochs, the best of them kept; a sixth time without a better one ends the training (its count is never set
back); the L2 strength is chosen on dev. On its torch `size_average=False` made the loss a sum, beside which L2 was
weaker; torch of today ignores it, and so do we. Weights begin, and rows come, alike for all probes of a seed.

R rows, B batch, L hidden states, D width, K sets of labels, G probes of a hidden state (K × strengths of L2), H hidden
units, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from mslt.data import keyed

SCORED_ROWS = 256  # at once


@dataclass(frozen=True)
class ProbeTraining:
    """SentEval's own numbers. With `num_hidden` 0 it is logistic regression."""

    num_hidden: int = 50
    learning_rate: float = 1e-3
    batch_size: int = 64
    l2: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    tenacity: int = 5
    round_epochs: int = 4
    max_epochs: int = 200


@dataclass(frozen=True)
class Features:
    """What probes read: `rows_RLD`, in any type and perhaps mapped from disk, times `scale_LD` plus `shift_LD`."""

    rows_RLD: torch.Tensor
    scale_LD: torch.Tensor
    shift_LD: torch.Tensor

    def of(self, rows: np.ndarray) -> torch.Tensor:
        """[B, L, D] fp32, on the device of scale and shift."""
        chosen = torch.from_numpy(rows).to(self.rows_RLD.device)
        x_BLD = self.rows_RLD[chosen].to(self.scale_LD.device).float()
        return torch.addcmul(self.shift_LD, x_BLD, self.scale_LD)

    def near(self, device: torch.device | str) -> "Features":
        """Read on the device; its rows, too, lie there where they take less than half of its free memory."""
        rows_RLD = self.rows_RLD
        if torch.device(device).type == "cuda" and rows_RLD.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            rows_RLD = rows_RLD.to(device)
        return Features(rows_RLD, self.scale_LD.to(device), self.shift_LD.to(device))


@dataclass(frozen=True)
class Probed:
    """Of the probe that was best on dev, [K, L] each: its accuracy there, its strength of L2, the epochs until it
    ended; and which test rows it had right, [K, L, R]."""

    dev: torch.Tensor
    l2: torch.Tensor
    epochs: torch.Tensor
    right: torch.Tensor


def train_probes(
    features: Features,
    labels_KR: torch.Tensor,
    splits: dict[str, np.ndarray],
    num_classes: int,
    training: ProbeTraining,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: torch.device | str = "cpu",
) -> Probed:
    """`splits` holds the rows of `tr`, `va` and `te`. `progress` is told how many of the probes have ended.

    The probes of a hidden state are one matrix product. Those that have ended leave it, but for as many as another
    hidden state has more, which go on unheeded.
    """
    (L, D), K, S = features.shift_LD.shape, len(labels_KR), len(training.l2)
    l2_G = torch.tensor(training.l2, device=device).repeat(K)
    set_G = torch.arange(K, device=device).repeat_interleave(S)
    features, labels_KR = features.near(device), labels_KR.to(device)
    begin = initial_weights(D, num_classes, training.num_hidden, seed)
    weights = [weight.to(device).expand(L, K * S, *weight.shape).clone() for weight in begin]
    optimizer = _adam(weights, training)
    dev_LG = torch.full((L, K * S), -1.0, device=device)
    misses_LG, epochs_LG = (torch.zeros(L, K * S, dtype=torch.int64, device=device) for _ in range(2))
    right_LGR = torch.zeros(L, K * S, len(splits["te"]), dtype=torch.bool, device=device)
    layer_L1, probe_LG = torch.arange(L, device=device)[:, None], torch.arange(K * S, device=device).expand(L, -1)
    epoch = 0
    while len(layer_L1) and epoch <= training.max_epochs:
        here = layer_L1, probe_LG  # the probes whose weights are still there
        read = partial(_read, features, labels_KR, layer_L1[:, 0], set_G[probe_LG])
        for _ in range(training.round_epochs):
            epoch += 1
            order = np.argsort(keyed.bits(seed, "probe_order", epoch, splits["tr"]), kind="stable")
            _train_epoch(weights, optimizer, read, splits["tr"][order], l2_G[probe_LG], training.batch_size)
        dev, right = _right(weights, read, splits["va"]).float().mean(-1), _right(weights, read, splits["te"])
        going = misses_LG[here] <= training.tenacity
        better = going & (dev > dev_LG[here])
        dev_LG[here] = torch.where(better, dev, dev_LG[here])
        right_LGR[here] = torch.where(better[..., None], right, right_LGR[here])
        epochs_LG[here] = torch.where(going, epoch, epochs_LG[here])
        misses_LG[here] += ~better
        going = misses_LG[here] <= training.tenacity
        if going.sum(1).max() < going.shape[1] or not going.any(1).all():
            stays_L, first_LG = going.any(1), going.int().argsort(dim=1, descending=True, stable=True)
            kept_LG = first_LG[stays_L, : going.sum(1).max()]
            weights, optimizer = _kept(weights, optimizer, stays_L, kept_LG, training)
            layer_L1, probe_LG = layer_L1[stays_L], probe_LG[stays_L].gather(1, kept_LG)
        progress(int((misses_LG > training.tenacity).sum()), misses_LG.numel())
    best_LK1 = dev_LG.view(L, K, S).argmax(-1, keepdim=True)

    def of_best(of_LG: torch.Tensor) -> torch.Tensor:
        return of_LG.view(L, K, S).take_along_dim(best_LK1, -1)[..., 0].T.cpu()

    right_LKSR = right_LGR.view(L, K, S, -1)
    right_KLR = right_LKSR.take_along_dim(best_LK1[..., None], 2)[:, :, 0].transpose(0, 1).cpu()
    return Probed(of_best(dev_LG), of_best(l2_G.expand(L, -1)), of_best(epochs_LG), right_KLR)


def initial_weights(width: int, num_classes: int, num_hidden: int, seed: int) -> list[torch.Tensor]:
    """Matrices [out, in] and biases [out] of one probe, as torch draws those of a Linear."""
    generator = torch.Generator().manual_seed(keyed.torch_seed(seed, "probe"))
    sizes = [(num_hidden, width), (num_classes, num_hidden)] if num_hidden else [(num_classes, width)]
    return [
        (2 * torch.rand(shape, generator=generator) - 1) / width_in**0.5
        for width_out, width_in in sizes
        for shape in ((width_out, width_in), (width_out,))
    ]


def probe_logits(weights: list[torch.Tensor], x_LBD: torch.Tensor) -> torch.Tensor:
    """[L, G, C, B] of `weights` [L, G, H, D], [L, G, H], [L, G, C, H] and [L, G, C]."""
    matrix, bias, *rest = weights
    out_LXB = torch.baddbmm(bias.flatten(1)[:, :, None], matrix.flatten(1, 2), x_LBD.transpose(1, 2))
    out_LGHB = out_LXB.unflatten(1, bias.shape[1:])
    return rest[0] @ out_LGHB.sigmoid() + rest[1][..., None] if rest else out_LGHB


Read = Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]


def _read(
    features: Features, labels_KR: torch.Tensor, layer_L: torch.Tensor, set_LG: torch.Tensor, rows: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """What probes read of these rows, [L, B, D], and their labels [L, G, B]."""
    labels_KB = labels_KR[:, torch.from_numpy(rows).to(labels_KR.device)]
    x_LBD = features.of(rows).transpose(0, 1)
    return x_LBD if len(layer_L) == len(x_LBD) else x_LBD[layer_L], labels_KB[set_LG]


def _train_epoch(
    weights: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    read: Read,
    rows: np.ndarray,
    l2_LG: torch.Tensor,
    batch_size: int,
) -> None:
    for first in range(0, len(rows), batch_size):
        x_LBD, labels_LGB = read(rows[first : first + batch_size])
        logits_LGCB = probe_logits(weights, x_LBD)
        loss = cross_entropy(logits_LGCB.flatten(0, 1), labels_LGB.flatten(0, 1), reduction="sum") / x_LBD.shape[1]
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            l2 = l2_LG.view(*l2_LG.shape, *(1,) * (weight.ndim - 2))
            # What Adam's weight_decay does; the fused one takes it for laid out as the weights are.
            weight.grad = gradient.contiguous().addcmul_(weight.detach(), l2)
        optimizer.step()
        optimizer.zero_grad()  # no second set of them beside the next pass's


@torch.no_grad()
def _right(weights: list[torch.Tensor], read: Read, rows: np.ndarray) -> torch.Tensor:
    """Which rows each probe has right, [L, G, R]."""
    found = []
    for first in range(0, len(rows), SCORED_ROWS):
        x_LBD, labels_LGB = read(rows[first : first + SCORED_ROWS])
        found.append(probe_logits(weights, x_LBD).argmax(2) == labels_LGB)
    return torch.cat(found, -1)


def _adam(weights: list[torch.Tensor], training: ProbeTraining) -> torch.optim.Adam:
    return torch.optim.Adam([w.requires_grad_() for w in weights], lr=training.learning_rate, fused=True)


def _kept(
    weights: list[torch.Tensor],
    optimizer: torch.optim.Adam,
    stays_L: torch.Tensor,
    kept_LG: torch.Tensor,
    training: ProbeTraining,
) -> tuple[list[torch.Tensor], torch.optim.Adam]:
    """Some of the hidden states, of each some of the probes, in a new optimizer that goes on as the old one would
    have."""

    def fewer(of: torch.Tensor) -> torch.Tensor:
        return of.detach()[stays_L][torch.arange(len(kept_LG), device=of.device)[:, None], kept_LG]

    left = [fewer(weight) for weight in weights]
    after = _adam(left, training)
    for weight, before in zip(left, weights, strict=True):
        state = optimizer.state[before]
        after.state[weight] = {"step": state["step"].clone(), "exp_avg": fewer(state["exp_avg"]),
                               "exp_avg_sq": fewer(state["exp_avg_sq"])}  # fmt: skip
    return left, after
