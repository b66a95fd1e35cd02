"""What a head has lost and got right, summed up over its samples.

N labels, C classes.
"""

from typing import Any

import torch
from torch.nn.functional import cross_entropy

# Elements of the logits that are in fp32 at a time: on a CPU what stays in its cache, on a GPU what fills it.
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


def head_sums(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """[3] fp32: the loss summed up, right predictions, labels that count; others are IGNORED_LABEL. Only the first has
    a gradient. The logits are kept for it as they are, and never held in fp32 as a whole."""
    sums: torch.Tensor = _HeadSums.apply(logits_NC, labels_N)  # type: ignore[no-untyped-call]
    return sums


class _HeadSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NC: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits_NC, labels_N)
        parts = []
        for logits, labels in _chunks(logits_NC, labels_N):
            logits = logits.float()
            loss = cross_entropy(logits, labels, reduction="sum")
            counts = (logits.argmax(-1) == labels).sum(), (labels >= 0).sum()
            parts.append(torch.stack([loss, *(count.float() for count in counts)]))
        return torch.stack(parts).sum(0)

    @staticmethod
    def backward(ctx: Any, grad_sums: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Softmax minus one at the label, times the loss's gradient."""
        logits_NC, labels_N = ctx.saved_tensors
        grad_NC = torch.empty_like(logits_NC)
        for logits, labels, grad in _chunks(logits_NC, labels_N, grad_NC):
            weight_N1 = grad_sums[0] * (labels >= 0)[:, None]
            part = logits.float().log_softmax(-1).exp_().mul_(weight_N1)
            grad.copy_(part.scatter_add_(1, labels.clamp(min=0)[:, None], -weight_N1))
        return grad_NC, None


def _chunks(*tensors: torch.Tensor) -> Any:
    """The tensors' rows, a few at a time. The first is [N, C]."""
    logits_NC = tensors[0]
    rows = max(1, _CHUNK_ELEMENTS[logits_NC.device.type] // logits_NC.shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
