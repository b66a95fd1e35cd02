"""Probes: a small classifier on each frozen hidden state, all of them trained together, each as if it were alone.

The classifier and its search are SentEval's (Conneau and Kiela 2018, arXiv:1803.05449), as in its
`tools/classifier.py` and `tools/validation.py`: one sigmoid layer or none, Adam with coupled L2, dev accuracy after
every 4 epochs, the best of them kept; a sixth time without a better one ends the training (its count is never set
back); the L2 strength is chosen on dev. On its torch `size_average=False` made the loss a sum, beside which L2 was
weaker; torch of today ignores it, and so do we. Weights begin, and rows come, alike for all probes of a seed.

R rows, B batch, L hidden states, D width, K sets of labels, P probes (L × K × strengths of L2), H hidden units,
C classes.
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
    """[K, L] each: accuracy on dev and test of the probe that was best on dev, its strength of L2, and the epochs until
    it ended."""

    dev: torch.Tensor
    test: torch.Tensor
    l2: torch.Tensor
    epochs: torch.Tensor


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
    """`splits` holds the rows of `tr`, `va` and `te`. `progress` is told how many of the probes have ended."""
    (L, D), K, S = features.shift_LD.shape, len(labels_KR), len(training.l2)
    P = L * K * S
    layer_P, set_P, strength_P = torch.cartesian_prod(*map(torch.arange, (L, K, S))).T.to(device)
    l2_P = torch.tensor(training.l2, device=device)[strength_P]
    features, labels_KR = features.near(device), labels_KR.to(device)
    begin = initial_weights(D, num_classes, training.num_hidden, seed)
    weights = [weight.to(device).expand(P, -1, -1).clone() for weight in begin]
    optimizer = _adam(weights, training)
    dev_P, test_P = (torch.full((P,), -1.0, device=device) for _ in range(2))
    misses_P, epochs_P = (torch.zeros(P, dtype=torch.int64, device=device) for _ in range(2))
    going = torch.arange(P, device=device)  # the probes whose weights are still here
    epoch = 0
    while len(going) and epoch <= training.max_epochs:
        read = partial(_read, features, labels_KR, layer_P[going], set_P[going])
        for _ in range(training.round_epochs):
            epoch += 1
            order = np.argsort(keyed.bits(seed, "probe_order", epoch, splits["tr"]), kind="stable")
            _train_epoch(weights, optimizer, read, splits["tr"][order], l2_P[going], training.batch_size)
        dev, test = (_accuracy(weights, read, splits[split]) for split in ("va", "te"))
        better = dev > dev_P[going]
        dev_P[going], test_P[going] = torch.where(better, dev, dev_P[going]), torch.where(better, test, test_P[going])
        misses_P[going] += ~better
        epochs_P[going] = epoch
        stays = better | (misses_P[going] <= training.tenacity)
        if not stays.all():
            weights, optimizer = _kept(weights, optimizer, stays, training)
            going = going[stays]
        progress(P - len(going), P)
    best_LK1 = dev_P.view(L, K, S).argmax(-1, keepdim=True)
    dev, test, l2, epochs = (
        of_P.view(L, K, S).take_along_dim(best_LK1, -1)[..., 0].T.cpu() for of_P in (dev_P, test_P, l2_P, epochs_P)
    )
    return Probed(dev, test, l2, epochs)


def initial_weights(width: int, num_classes: int, num_hidden: int, seed: int) -> list[torch.Tensor]:
    """Matrices [in, out] and biases [1, out] of one probe, as torch draws those of a Linear."""
    generator = torch.Generator().manual_seed(keyed.torch_seed(seed, "probe"))
    sizes = [(width, num_hidden), (num_hidden, num_classes)] if num_hidden else [(width, num_classes)]
    return [
        (2 * torch.rand(rows, columns, generator=generator) - 1) / width_in**0.5
        for width_in, columns in sizes
        for rows in (width_in, 1)
    ]


def probe_logits(weights: list[torch.Tensor], x_PBD: torch.Tensor) -> torch.Tensor:
    """[P, B, C]."""
    matrix, bias, *rest = weights
    out = torch.baddbmm(bias, x_PBD, matrix)
    return torch.baddbmm(rest[1], out.sigmoid(), rest[0]) if rest else out


Read = Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]


def _read(
    features: Features, labels_KR: torch.Tensor, layer_P: torch.Tensor, set_P: torch.Tensor, rows: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """What probes read of these rows, [P, B, D], and their labels [P, B]."""
    labels_KB = labels_KR[:, torch.from_numpy(rows).to(labels_KR.device)]
    return features.of(rows).transpose(0, 1)[layer_P], labels_KB[set_P]


def _train_epoch(
    weights: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    read: Read,
    rows: np.ndarray,
    l2_P: torch.Tensor,
    batch_size: int,
) -> None:
    for first in range(0, len(rows), batch_size):
        x_PBD, labels_PB = read(rows[first : first + batch_size])
        logits_PBC = probe_logits(weights, x_PBD)
        loss = cross_entropy(logits_PBC.flatten(0, 1), labels_PB.flatten(), reduction="sum") / labels_PB.shape[1]
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient.addcmul_(weight.detach(), l2_P[:, None, None])  # what Adam's weight_decay does
        optimizer.step()


@torch.no_grad()
def _accuracy(weights: list[torch.Tensor], read: Read, rows: np.ndarray) -> torch.Tensor:
    """[P]."""
    correct_P = torch.zeros(len(weights[0]), device=weights[0].device)
    for first in range(0, len(rows), SCORED_ROWS):
        x_PBD, labels_PB = read(rows[first : first + SCORED_ROWS])
        correct_P += (probe_logits(weights, x_PBD).argmax(-1) == labels_PB).sum(1)
    return correct_P / len(rows)


def _adam(weights: list[torch.Tensor], training: ProbeTraining) -> torch.optim.Adam:
    return torch.optim.Adam([w.requires_grad_() for w in weights], lr=training.learning_rate, fused=True)


def _kept(
    weights: list[torch.Tensor], optimizer: torch.optim.Adam, stays: torch.Tensor, training: ProbeTraining
) -> tuple[list[torch.Tensor], torch.optim.Adam]:
    """Some of the probes, in a new optimizer that goes on as the old one would have."""
    fewer = [weight.detach()[stays] for weight in weights]
    after = _adam(fewer, training)
    for weight, before in zip(fewer, weights, strict=True):
        state = optimizer.state[before]
        after.state[weight] = {"step": state["step"].clone(), "exp_avg": state["exp_avg"][stays],
                               "exp_avg_sq": state["exp_avg_sq"][stays]}  # fmt: skip
    return fewer, after
