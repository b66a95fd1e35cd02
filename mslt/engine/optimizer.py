"""LAMB (You et al. 2020, "Large batch optimization for deep learning", arXiv:1904.00962, algorithm 2)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mslt.config import OptimizerConfig


class Lamb(torch.optim.Optimizer):
    """Adam's direction with decoupled weight decay, scaled tensor by tensor to the weights' norm.

    m and v are bias-corrected, phi is the identity, no clamp on the trust ratio. A tensor whose norm or whose update
    is zero takes ratio 1. Groups with `adapt` False (biases, LayerNorm) take ratio 1 always, as in the authors' BERT
    code. Knows nothing of ZeRO's flat partitions: a parameter here must be a whole tensor.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, beta1: float, beta2: float, eps: float) -> None:
        defaults = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": 0.0, "adapt": True, "step": 0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter, all of which have a gradient."""
        assert closure is None
        for group in self.param_groups:
            weights = group["params"]
            grads = [weight.grad for weight in weights]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["exp_avg"] = torch.zeros_like(weight)
                    self.state[weight]["exp_avg_sq"] = torch.zeros_like(weight)
            m = [self.state[weight]["exp_avg"] for weight in weights]
            v = [self.state[weight]["exp_avg_sq"] for weight in weights]
            group["step"] += 1

            torch._foreach_lerp_(m, grads, 1 - group["beta1"])
            torch._foreach_mul_(v, group["beta2"])
            torch._foreach_addcmul_(v, grads, grads, 1 - group["beta2"])

            denominators = torch._foreach_div(v, 1 - group["beta2"] ** group["step"])
            torch._foreach_sqrt_(denominators)
            torch._foreach_add_(denominators, group["eps"])
            updates = torch._foreach_div(m, 1 - group["beta1"] ** group["step"])
            torch._foreach_div_(updates, denominators)
            if group["weight_decay"]:
                torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
            if group["adapt"]:
                weight_norms = torch.stack(torch._foreach_norm(weights))
                update_norms = torch.stack(torch._foreach_norm(updates))
                ratios = torch.where((weight_norms > 0) & (update_norms > 0), weight_norms / update_norms, 1.0)
                torch._foreach_mul_(updates, list(ratios.unbind()))
            torch._foreach_add_(weights, updates, alpha=-group["lr"])


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> Lamb:
    """Over exactly the parameters that require a gradient; vectors (biases, LayerNorm) neither decay nor adapt."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay, "adapt": True},
        {"params": [p for p in trainable if p.ndim == 1], "weight_decay": 0.0, "adapt": False},
    ]
    return Lamb(groups, config.learning_rate, config.beta1, config.beta2, config.eps)
