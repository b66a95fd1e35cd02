"""What of each parameter this rank's optimizer holds: whole parameters, or runs of elements of ZeRO's partitions.

ZeRO flattens the parameters, gives every rank an equal part of the result, and shows the optimizer that part as one
tensor, in which a parameter can begin or end anywhere. Norms of a parameter, state by name, and checkpoints that any
number of workers can read need the parameter's own borders back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + numel` of the flattened parameter `name`, at `offset` of the flattened `holder`:
    the tensor that the optimizer updates and whose gradient it reads."""

    name: str
    start: int
    numel: int
    holder: torch.Tensor
    offset: int
    is_matrix: bool

    def weight(self) -> torch.Tensor:
        """[numel], a view."""
        return self.holder.detach().view(-1).narrow(0, self.offset, self.numel)

    def grad(self) -> torch.Tensor:
        """[numel]. Every trainable parameter has a gradient: the loss reaches all slots that the plan trains."""
        assert self.holder.grad is not None, f"{self.name} has no gradient"
        return self.holder.grad.view(-1).narrow(0, self.offset, self.numel)


def whole_pieces(parameters: dict[str, torch.nn.Parameter]) -> list[Piece]:
    """Without ZeRO: each parameter is one piece."""
    return [Piece(name, 0, p.numel(), p, 0, p.ndim > 1) for name, p in parameters.items()]


def zero_pieces(zero: Any, parameters: dict[str, torch.nn.Parameter], rank: int) -> list[Piece]:
    """With ZeRO-1, 2 or 3: `zero` is DeepSpeed's optimizer, `parameters` all trainable ones by name."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = _sharded_weights(zero, rank) if hasattr(zero, "fp32_partitioned_groups_flat") else _flat_groups(zero)
    return [
        Piece(names[id(parameter)], start, numel, holder, offset, len(_shape(parameter)) > 1)
        for parameter, holder, offset, start, numel in found
        if numel > 0
    ]


_Found = Iterator[tuple[torch.nn.Parameter, torch.Tensor, int, int, int]]


def _flat_groups(zero: Any) -> _Found:
    """ZeRO-1 and 2: a group's parameters lie end to end, cut into equal parts; `_hp_mapping` says which cut a
    parameter has in this rank's part, None where it has none."""
    for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                held, own = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                yield parameter, flat, held.start, own.start, own.numel


def _sharded_weights(zero: Any, rank: int) -> _Found:
    """ZeRO-3: each parameter is cut into equal parts, the last padded; this rank's parts lie end to end."""
    for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            part = parameter.partition_numel()
            start = rank * part
            yield parameter, flat, offset, start, max(min(part, parameter.ds_numel - start), 0)
            offset += part


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Under ZeRO-3 the parameter itself is an empty tensor between uses."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
