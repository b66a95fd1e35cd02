"""Gradients added up over the ranks while the backward pass still runs, in buckets (Li et al. 2020, "PyTorch
Distributed", arXiv:2006.15704, section 3.2). DeepSpeed does that with ZeRO alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import Parameter


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object: ...


@dataclass
class Bucket:
    """Parameters whose gradients travel together, and what travels: flat, and as one view for each of them."""

    parameters: list[Parameter]
    flat: torch.Tensor
    views: list[torch.Tensor]
    num_missing: int = 0
    work: Work | None = None

    def gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


class Reducer:
    """Makes every gradient the mean over the ranks; the same bits on all of them.

    Between `begin` and `finish` there is one backward pass, that comes to every parameter once. Gradients are divided,
    then added: the sum of many overflows fp16.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        dtype: torch.dtype,
        bucket_elements: int,
        num_ranks: int,
        start_sum: Callable[[torch.Tensor], Work],
    ) -> None:
        """`start_sum` begins to add a tensor up over the ranks, in place. Buckets hold at most `bucket_elements`, or
        one parameter."""
        self._num_ranks = num_ranks
        self._start_sum = start_sum
        self._buckets: list[Bucket] = []
        self._next: int | None = None  # the first bucket not under way; None outside of begin and finish
        from_the_top = reversed(list(parameters))  # about as the backward pass comes to them
        for together in _groups(from_the_top, bucket_elements):
            sizes = [parameter.numel() for parameter in together]
            flat = torch.empty(sum(sizes), dtype=dtype, device=together[0].device)
            views = [part.view_as(p) for part, p in zip(flat.split(sizes), together, strict=True)]
            self._buckets.append(Bucket(together, flat, views))
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._has_gradient(bucket))
            for bucket in self._buckets
            for parameter in bucket.parameters
        ]

    def begin(self) -> None:
        """The next backward pass is the last of its step: what it has done may travel."""
        self._next = 0
        for bucket in self._buckets:
            bucket.num_missing = len(bucket.parameters)

    def _has_gradient(self, bucket: Bucket) -> None:
        if self._next is None:
            return
        bucket.num_missing -= 1
        # In the same order on every rank, or they would add up different buckets.
        while self._next < len(self._buckets) and self._buckets[self._next].num_missing == 0:
            self._send(self._buckets[self._next])
            self._next += 1

    @torch.no_grad()
    def _send(self, bucket: Bucket) -> None:
        torch._foreach_copy_(bucket.views, bucket.gradients())
        bucket.flat.mul_(1 / self._num_ranks)
        bucket.work = self._start_sum(bucket.flat)

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for what travels, and put the means into the gradients."""
        assert self._next == len(self._buckets), "a parameter has no gradient"
        self._next = None
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            torch._foreach_copy_(bucket.gradients(), bucket.views)
            bucket.work = None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._buckets.clear()


def _groups(parameters: Iterable[Parameter], most_elements: int) -> Iterable[list[Parameter]]:
    """Neighbours together, up to so many elements, or one that has more."""
    together: list[Parameter] = []
    for parameter in parameters:
        if together and sum(p.numel() for p in together) + parameter.numel() > most_elements:
            yield together
            together = []
        together.append(parameter)
    if together:
        yield together
