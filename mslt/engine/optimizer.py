"""LAMB (You et al. 2020, "Large batch optimization for deep learning", arXiv:1904.00962, algorithm 2) and AdamW
(Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), exact in every ZeRO stage."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mslt.config import OptimizerConfig
from mslt.engine.apex import ApexLamb
from mslt.engine.pieces import Piece, whole_pieces
from mslt.errors import MsltError

STATE = ("exp_avg", "exp_avg_sq")


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
        self._held = slice(0, sum(piece.is_matrix for piece in pieces))
        position = {name: index for index, name in enumerate(matrices)}
        held = [position[piece.name] for piece in self.pieces[self._held]]
        self._position = torch.tensor(held, dtype=torch.long, device=device)
        self._weights = [piece.weight() for piece in self.pieces]
        dtype = self._weights[0].dtype if self._weights else torch.float32
        self._squares = torch.zeros(2, len(matrices), dtype=dtype, device=device)
        self._sum = sum_over_ranks
        self.moments = {key: [torch.zeros_like(weight) for weight in self._weights] for key in STATE}
        self.steps = [0] * len(self.pieces)
        self._apex = ApexLamb(self.pieces, self.moments, self.config) if self.config.implementation == "apex" else None
        self._bound = True

    def begin_step(self) -> None:
        """Until `step` says otherwise this one is left out: ZeRO-3 does not ask for one that is not finite."""
        self.applied = False
        self.gradient_norm = torch.tensor(math.nan)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every piece, all of which have a gradient. Gradients are scaled in place."""
        assert closure is None
        if not self._bound:
            return
        grads = [piece.grad() for piece in self.pieces]
        self.applied = self._scale_gradient(grads)
        if not self.applied:
            return
        self.steps = [steps + 1 for steps in self.steps]
        if self._apex is not None:
            assert len(set(self.steps)) == 1, "a recipe that carries moments is refused with apex"
            self._apex.step(self.param_groups[0]["lr"], self.steps[0])
            return
        updates = self._directions(grads) if grads else []
        if self.config.weight_decay and updates[self._held]:
            weights = self._weights[self._held]
            torch._foreach_add_(updates[self._held], weights, alpha=self.config.weight_decay)
        if self.config.name == "lamb":
            self.trust_ratios = self._ratios(updates[self._held])
            if updates[self._held]:
                torch._foreach_mul_(updates[self._held], list(self.trust_ratios[self._position].unbind()))
        if updates:
            torch._foreach_add_(self._weights, updates, alpha=-self.param_groups[0]["lr"])

    def _scale_gradient(self, grads: list[torch.Tensor]) -> bool:
        """Unscale, then clip or normalise. False, with the gradient as it was, where the step must be left out."""
        norms = torch._foreach_norm(grads) if grads else []  # with ZeRO a rank can hold nothing
        square = torch.stack([self._squares.new_zeros(()), *norms]).square().sum()
        if self._sum is not None:
            self._sum(square)
        norm, scale = square.sqrt(), 1.0 if self.loss_scale is None else self.loss_scale.value
        self.gradient_norm = norm / scale
        if self.must_look and not math.isfinite(norm.item()):
            return False
        factor = torch.ones_like(norm)
        if self.config.normalize_gradient:
            factor = torch.where(norm > 0, 1 / self.gradient_norm, factor)
        elif self.clip_norm > 0:
            factor = (self.clip_norm / (self.gradient_norm + 1e-6)).clamp(max=1.0)
        if grads and (self.loss_scale is not None or self.config.normalize_gradient or self.clip_norm > 0):
            torch._foreach_mul_(grads, factor / scale)
        return True

    def _directions(self, grads: list[torch.Tensor]) -> list[torch.Tensor]:
        """Adam's direction m / (sqrt(v) + eps) of every piece, both moments corrected for their start at 0."""
        m, v = (self.moments[key] for key in STATE)
        beta1, beta2 = self.config.beta1, self.config.beta2
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        if self.config.bias_correction:
            denominators = torch._foreach_div(v, [1 - beta2**steps for steps in self.steps])
            directions = torch._foreach_div(m, [1 - beta1**steps for steps in self.steps])
        else:
            denominators, directions = torch._foreach_mul(v, 1.0), torch._foreach_mul(m, 1.0)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, self.config.eps)
        torch._foreach_div_(directions, denominators)
        return list(directions)

    def _ratios(self, updates: list[torch.Tensor]) -> torch.Tensor:
        """Norm of the weights over norm of the update, for each matrix of all ranks."""
        squares = torch.zeros_like(self._squares)
        if updates:
            held = torch._foreach_norm(self._weights[self._held]), torch._foreach_norm(updates)
            squares.index_add_(1, self._position, torch.stack([torch.stack(norms) for norms in held]).square())
        if self._sum is not None:
            self._sum(squares)
        weight_norms, update_norms = squares.sqrt()
        ratios = weight_norms / update_norms
        if self.config.trust_ratio_bounds is not None:
            ratios = ratios.clamp(*self.config.trust_ratio_bounds)
        return torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)


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
