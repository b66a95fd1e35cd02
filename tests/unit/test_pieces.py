"""Pieces give every parameter its own borders back, in ZeRO's partitions as DeepSpeed itself maps them."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.utils import link_hp_params

from mslt.engine.pieces import Piece, whole_pieces, zero_pieces

Params = dict[str, torch.nn.Parameter]


def parameters(seed: int, count: int = 9) -> Params:
    """Vectors and matrices of 1 to 40 elements."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index in range(count):
        shape = torch.randint(1, 7, (1 + index % 2,), generator=generator).tolist()
        found[f"p{index}"] = torch.nn.Parameter(torch.randn(shape, generator=generator))
    return found


def put_together(ranks: list[list[Piece]], params: Params, kind: str) -> dict[str, torch.Tensor]:
    """What the pieces of all ranks show, by parameter; no element may be shown twice, none is left out."""
    whole = {name: torch.full((p.numel(),), math.nan) for name, p in params.items()}
    for piece in (piece for pieces in ranks for piece in pieces):
        shown = getattr(piece, kind)()
        assert shown.shape == (piece.numel,)
        place = whole[piece.name][piece.start : piece.start + piece.numel]
        assert len(place) == piece.numel
        assert place.isnan().all()
        place.copy_(shown)
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def flat_ranks(params: Params, world_size: int, groups: int = 1) -> list[list[Piece]]:
    """ZeRO-1 and 2: parameters end to end, padded to an even part for each rank, linked by DeepSpeed."""
    named = list(params.items())
    split = [dict(named[first::groups]) for first in range(groups)]
    ranks = []
    for rank in range(world_size):
        holders = []
        for group in split:
            flat = torch.cat([p.detach().flatten() for p in group.values()])
            flat = torch.cat([flat, flat.new_zeros(-len(flat) % (2 * world_size))])
            part = len(flat) // world_size
            holder = torch.nn.Parameter(flat[rank * part : (rank + 1) * part].clone())
            holder.grad = 3 * holder.detach()
            holders.append(holder)
            link_hp_params(list(group.values()), holder, {}, {}, False, 0, rank * part, part, None)
        zero = SimpleNamespace(
            bit16_groups=[list(group.values()) for group in split], single_partition_of_fp32_groups=holders
        )
        ranks.append(zero_pieces(zero, params, rank))
    return ranks


def sharded_ranks(params: Params, world_size: int, groups: int = 1) -> list[list[Piece]]:
    """ZeRO-3: each parameter is cut into equal parts, the last padded; a rank's parts lie end to end. Between uses the
    parameter itself is empty."""
    named = list(params.items())
    split = [dict(named[first::groups]) for first in range(groups)]
    whole = {name: p.detach().clone() for name, p in params.items()}
    for parameter in params.values():
        part = -(-parameter.numel() // world_size)
        told: dict[str, Any] = {"ds_numel": parameter.numel(), "ds_shape": parameter.shape}
        parameter.__dict__.update(told, partition_numel=lambda part=part: part)
        parameter.data = torch.empty(0)
    ranks = []
    for rank in range(world_size):
        holders = []
        for group in split:
            parts = []
            for name, parameter in group.items():
                size = parameter.partition_numel()
                padded = torch.cat([whole[name].flatten(), torch.zeros(size * world_size - whole[name].numel())])
                parts.append(padded[rank * size : (rank + 1) * size])
            holder = torch.nn.Parameter(torch.cat(parts))
            holder.grad = 3 * holder.detach()
            holders.append(holder)
        zero = SimpleNamespace(
            fp16_groups=[list(group.values()) for group in split], fp32_partitioned_groups_flat=holders
        )
        ranks.append(zero_pieces(zero, params, rank))
    return ranks


CUTS = {"end to end": flat_ranks, "each on its own": sharded_ranks}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_hold_every_element_once_under_its_name(seed: int, world_size: int, cut: str) -> None:
    params = parameters(seed)
    before = {name: p.detach().clone() for name, p in params.items()}
    for groups in (1, 2):
        params = parameters(seed)
        ranks = CUTS[cut](params, world_size, groups)
        weights, grads = (put_together(ranks, params_of(before), kind) for kind in ("weight", "grad"))
        for name, tensor in before.items():
            assert torch.equal(weights[name], tensor.flatten())
            assert torch.equal(grads[name], 3 * tensor.flatten())
        for piece in (piece for pieces in ranks for piece in pieces):
            assert piece.is_matrix == (before[piece.name].ndim > 1)
            assert piece.numel > 0


def params_of(tensors: dict[str, torch.Tensor]) -> Params:
    return {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("cut", CUTS)
def test_a_rank_may_hold_nothing(cut: str) -> None:
    params = params_of({"a": torch.randn(2, 1), "b": torch.randn(1)})
    ranks = CUTS[cut](params, 4)
    assert [[(piece.name, piece.start, piece.numel) for piece in pieces] for pieces in ranks] == {
        "end to end": [[("a", 0, 2)], [("b", 0, 1)], [], []],
        "each on its own": [[("a", 0, 1), ("b", 0, 1)], [("a", 1, 1)], [], []],
    }[cut]


def test_without_zero_a_piece_is_a_parameter() -> None:
    params = parameters(2)
    for parameter in params.values():
        parameter.grad = 3 * parameter.detach()
    pieces = whole_pieces(params)
    assert [(piece.name, piece.start, piece.offset, piece.numel) for piece in pieces] == [
        (name, 0, 0, p.numel()) for name, p in params.items()
    ]
    assert [piece.is_matrix for piece in pieces] == [p.ndim > 1 for p in params.values()]
    for kind in ("weight", "grad"):
        for name, tensor in put_together([pieces], params, kind).items():
            assert torch.equal(tensor, (1 if kind == "weight" else 3) * params[name].detach().flatten())


def test_what_is_written_to_a_piece_is_in_the_tensor() -> None:
    holder = torch.nn.Parameter(torch.arange(6.0))
    holder.grad = torch.zeros(6)
    piece = Piece("a", 10, 3, holder, 2, True)
    piece.weight().mul_(10)
    piece.grad().add_(1)
    assert holder.tolist() == [0, 1, 20, 30, 40, 5]
    assert holder.grad.tolist() == [0, 0, 1, 1, 1, 0]
    assert not piece.weight().requires_grad


def test_a_piece_without_gradient_names_its_parameter() -> None:
    piece = Piece("bert.pooler.dense.bias", 0, 2, torch.nn.Parameter(torch.zeros(2)), 0, False)
    with pytest.raises(AssertionError, match=r"bert\.pooler\.dense\.bias has no gradient"):
        piece.grad()
