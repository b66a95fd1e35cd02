"""LAMB (You et al. 2020, "Large batch optimization for deep learning", arXiv:1904.00962, algorithm 2) and AdamW
(Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), exact in every ZeRO stage."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from mslt.config import OptimizerConfig
from mslt.engine.apex import ApexLamb
from mslt.engine.pieces import Piece, whole_pieces
from mslt.errors import MsltError

STATE = ("exp_avg", "exp_avg_sq")
# What a CPU updates at a time: with moments, gradient and one temporary 10 MB, which stay in its cache, and 16 threads
# still get torch's 32768 elements each. On 2 cores 2**18 to 2**21 are within 7 % of each other.
CPU_CHUNK_ELEMENTS = 2**19


@dataclass
class LossScale:
    """The factor that keeps fp16 gradients from vanishing (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2):
    doubled after `growth_interval` good steps, halved by a step whose gradient is not finite."""

    value: float = 2.0**16
    good_steps: int = 0
    growth_interval: int = 2000

    def update(self, finite: bool) -> None:
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps == self.growth_interval:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict[str, float]:
        return asdict(self)


class Lamb(torch.optim.Optimizer):
    """Adam's direction with decoupled weight decay, for LAMB scaled tensor by tensor to the weights' norm.

    Matrices decay and adapt; vectors (biases, LayerNorm) do neither, as in the authors' BERT code. A tensor whose
    norm or whose update is zero takes ratio 1. The gradient is unscaled and clipped here, to the norm over all
    tensors, and a step whose gradient is not finite is left out where `leaves_out_bad_steps`: DeepSpeed does these
    in another way for each ZeRO stage, and not on all ranks alike.

    Until `bind` says which pieces of which parameters this rank holds, `step` does nothing. Norms of parameters that
    are cut into pieces are summed over the ranks: four bytes for the gradient, and eight for each matrix.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        config: OptimizerConfig,
        clip_norm: float,
        loss_scale: LossScale | None = None,
        leaves_out_bad_steps: bool = False,
    ) -> None:
        super().__init__(parameters, {"lr": config.learning_rate})
        self.config = config
        self.clip_norm = clip_norm
        self.loss_scale = loss_scale
        self.must_look = loss_scale is not None or leaves_out_bad_steps
        self.applied = False  # whether the last step changed the weights
        self.gradient_norm: torch.Tensor | None = None  # of the last step: unscaled, before clipping
        self.trust_ratios: torch.Tensor | None = None  # of the last step: one for each matrix of all ranks
        self.pieces: list[Piece] = []
        self._bound = False

    def bind(
        self,
        pieces: list[Piece],
        matrices: list[str],
        device: torch.device,
        sum_over_ranks: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        """Take these pieces of the parameters; `matrices` names those of all ranks. `sum_over_ranks` adds a tensor up
        over the ranks in place, None where every rank holds whole parameters."""
        self.pieces = sorted(pieces, key=lambda piece: not piece.is_matrix)  # stable: matrices first
        position = {name: index for index, name in enumerate(matrices)}
        held = [position[piece.name] for piece in self.pieces if piece.is_matrix]
        self._position = torch.tensor(held, dtype=torch.long, device=device)
        self._weights = [piece.weight() for piece in self.pieces]
        dtype = self._weights[0].dtype if self._weights else torch.float32
        self._squares = torch.zeros(2, len(matrices), dtype=dtype, device=device)
        self._sum = sum_over_ranks
        self.moments = {key: [torch.zeros_like(weight) for weight in self._weights] for key in STATE}
        self.steps = [0] * len(self.pieces)
        total = sum(piece.numel for piece in self.pieces)
        self._chunk_elements = CPU_CHUNK_ELEMENTS if device.type == "cpu" else total
        self._groups = _groups(self.pieces, self._chunk_elements)
        self._apex = ApexLamb(self.pieces, self.moments, self.config) if self.config.implementation == "apex" else None
        self._bound = True

    def begin_step(self) -> None:
        """Until `step` says otherwise this one is left out: ZeRO-3 does not ask for one that is not finite."""
        self.applied = False
        self.gradient_norm = torch.tensor(math.nan)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every piece, all of which have a gradient. It is made in the gradients' memory: fresh pages
        would cost a CPU more than the arithmetic."""
        assert closure is None
        if not self._bound:
            return
        grads = [piece.grad() for piece in self.pieces]
        factor = self._gradient_factor(grads)
        self.applied = factor is not None
        if factor is None:
            return
        self.steps = [steps + 1 for steps in self.steps]
        rate = self.param_groups[0]["lr"]
        if self._apex is not None:
            assert len(set(self.steps)) == 1, "a recipe that carries moments is refused with apex"
            torch._foreach_mul_(grads, factor)
            self._apex.step(rate, self.steps[0])
            return
        norms, ratios = self._to_updates(grads, factor), []
        if self.config.name == "lamb":
            self.trust_ratios = self._ratios(norms)
            ratios = list(self.trust_ratios[self._position].unbind())
        for group in self._groups:
            for weights, updates in self._chunks(group, self._weights, grads):
                if ratios[group]:  # vectors come after all that have one
                    torch._foreach_mul_(updates, ratios[group])
                torch._foreach_add_(weights, updates, alpha=-rate)

    def _chunks(self, group: slice, *lists: list[torch.Tensor]) -> Iterable[Any]:
        """The group's tensors of each list; of a tensor alone, runs of its elements one after the other."""
        held = [tensors[group] for tensors in lists]
        if len(held[0]) > 1:
            return [held]
        return zip(*([[run] for run in tensor.split(self._chunk_elements)] for (tensor,) in held), strict=True)

    def _gradient_factor(self, grads: list[torch.Tensor]) -> torch.Tensor | None:
        """What unscales the gradient, then clips or normalises it; None where the step must be left out."""
        norms = torch._foreach_norm(grads) if grads else []  # with ZeRO a rank can hold nothing
        square = torch.stack([self._squares.new_zeros(()), *norms]).square().sum()
        if self._sum is not None:
            self._sum(square)
        norm, scale = square.sqrt(), 1.0 if self.loss_scale is None else self.loss_scale.value
        self.gradient_norm = norm / scale
        if self.must_look and not math.isfinite(norm.item()):
            return None
        factor = torch.ones_like(norm)
        if self.config.normalize_gradient:
            factor = torch.where(norm > 0, 1 / self.gradient_norm, factor)
        elif self.clip_norm > 0:
            factor = (self.clip_norm / (self.gradient_norm + 1e-6)).clamp(max=1.0)
        return factor / scale

    def _to_updates(self, grads: list[torch.Tensor], factor: torch.Tensor) -> list[torch.Tensor]:
        """Gradients become updates, whose ratio is still to be taken. Returns for LAMB the norms of weights and
        updates: [2, matrices of a group] of each group."""
        norms = []
        for group in self._groups:
            is_matrix = self.pieces[group.start].is_matrix
            for weights, m, v, chunk in self._chunks(group, self._weights, *self.moments.values(), grads):
                torch._foreach_mul_(chunk, factor)
                self._to_directions(chunk, m, v, self.steps[group])
                if is_matrix and self.config.weight_decay:
                    torch._foreach_add_(chunk, weights, alpha=self.config.weight_decay)
            if is_matrix and self.config.name == "lamb":
                held = torch._foreach_norm(self._weights[group]), torch._foreach_norm(grads[group])
                norms.append(torch.stack([torch.stack(of_each) for of_each in held]))
        return norms

    def _to_directions(
        self, grads: list[torch.Tensor], m: list[torch.Tensor], v: list[torch.Tensor], steps: list[int]
    ) -> None:
        """Gradients become Adam's directions m / (sqrt(v) + eps), both moments corrected for their start at 0."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        torch._foreach_copy_(grads, m)
        if self.config.bias_correction:
            torch._foreach_div_(grads, [1 - beta1**n for n in steps])
            denominators = torch._foreach_div(v, [1 - beta2**n for n in steps])
            torch._foreach_sqrt_(denominators)
        else:
            denominators = torch._foreach_sqrt(v)
        torch._foreach_add_(denominators, self.config.eps)
        torch._foreach_div_(grads, denominators)

    def _ratios(self, norms: list[torch.Tensor]) -> torch.Tensor:
        """Norm of the weights over norm of the update, for each matrix of all ranks."""
        squares = torch.zeros_like(self._squares)
        if norms:
            squares.index_add_(1, self._position, torch.cat(norms, dim=1).square())
        if self._sum is not None:
            self._sum(squares)
        weight_norms, update_norms = squares.sqrt()
        ratios = weight_norms / update_norms
        if self.config.trust_ratio_bounds is not None:
            ratios = ratios.clamp(*self.config.trust_ratio_bounds)
        return torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)


def _groups(pieces: list[Piece], most_elements: int) -> list[slice]:
    """What is updated together: matrices or vectors, no more elements than this, or one piece alone."""
    begins, elements = [], 0
    for index, piece in enumerate(pieces):
        elements += piece.numel
        if index == 0 or elements > most_elements or piece.is_matrix != pieces[index - 1].is_matrix:
            begins.append(index)
            elements = piece.numel
    return [slice(*borders) for borders in pairwise([*begins, len(pieces)])]


def refuse_unequal_apex(config: OptimizerConfig, device: torch.device) -> None:
    """MsltError where the FusedLAMB that is installed does not make our updates, shown on three steps of three tensors:
    its versions differ in more than speed."""
    ends = []
    for implementation in ("foreach", "apex"):
        generator = torch.Generator().manual_seed(0)
        shapes = {"matrix": (64, 48), "other": (8, 16), "vector": (48,)}
        weights = {n: torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for n, s in shapes.items()}
        optimizer = Lamb(weights.values(), config.model_copy(update={"implementation": implementation}), clip_norm=1.0)
        optimizer.bind(whole_pieces(weights), ["matrix", "other"], device)
        optimizer.param_groups[0]["lr"] = 0.01
        for _ in range(3):
            for weight in weights.values():
                weight.grad = torch.randn(weight.shape, generator=generator).to(device)
            optimizer.step()
        ends.append(weights)
    for name in ends[0]:
        ours, theirs = (end[name].detach() for end in ends)
        if not torch.allclose(ours, theirs, rtol=0, atol=1e-5 * ours.abs().max().item()):
            raise MsltError(
                "optimizer.implementation apex: the FusedLAMB that is installed makes another update than LAMB's paper "
                f"of a test {name}; write foreach"
            )
