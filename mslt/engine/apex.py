"""NVIDIA's FusedLAMB (apex): the update of all tensors in a few CUDA kernels. Never required.

DeepSpeed's FusedLamb is not an alternative: with bias correction it scales the weight decay too, after the trust ratio
was taken (csrc/lamb/fused_lamb_cuda_kernel.cu: `step_size` multiplies m / denominator + decay * weight).
"""

from typing import Any

import torch

from mslt.config import OptimizerConfig
from mslt.engine.pieces import Piece
from mslt.errors import MsltError

try:
    from apex.optimizers import FusedLAMB
except ImportError:  # absent, or the unrelated package of that name on the package index
    FusedLAMB = None

NO_CLIPPING = 1e30


class ApexLamb:
    """FusedLAMB over whole parameters, on moments that someone else owns."""

    def __init__(self, pieces: list[Piece], moments: dict[str, list[torch.Tensor]], config: OptimizerConfig) -> None:
        if FusedLAMB is None:
            raise MsltError(
                "optimizer.implementation apex: NVIDIA's apex is not installed with its CUDA extensions (the `apex` on "
                "the package index is another); install it from github.com/NVIDIA/apex, or write `foreach`"
            )
        groups = [
            {"params": [piece.holder for piece in pieces if piece.is_matrix == decays], "weight_decay": decay}
            for decays, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        self._lamb: Any = FusedLAMB(
            [group for group in groups if group["params"]],
            bias_correction=config.bias_correction,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            max_grad_norm=NO_CLIPPING,  # done before
            use_nvlamb=False,  # a trust ratio where weights decay, 1 elsewhere
        )
        for index, piece in enumerate(pieces):
            self._lamb.state[piece.holder] = {key: held[index].view_as(piece.holder) for key, held in moments.items()}

    def step(self, rate: float, steps: int) -> None:
        """The update number `steps`, counted from 1, with the gradients that the parameters hold."""
        for group in self._lamb.param_groups:
            group["lr"], group["step"] = rate, steps - 1
        self._lamb.step()
