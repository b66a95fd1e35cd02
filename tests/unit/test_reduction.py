"""Gradients that travel in buckets while the backward pass runs. Ranks are played by copies of one."""

import pytest
import torch
from torch import nn

from mslt.engine.reduction import Reducer

RANKS = 4


class Ring:
    """All ranks have the same gradient; writes down what travels, and adds it up only when it is waited for."""

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []
        self.copies: list[torch.Tensor] = []

    def start_sum(self, tensor: torch.Tensor) -> "Sum":
        self.sent.append(tensor)
        self.copies.append(tensor.clone())
        return Sum(tensor)


class Sum:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def wait(self) -> None:
        self.tensor.mul_(RANKS)


def made(bucket_elements: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Reducer, Ring]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))  # 32+8, 64+8, 16+2 elements
    ring = Ring()
    return model, Reducer(model.parameters(), dtype, bucket_elements, RANKS, ring.start_sum), ring


def backward(model: nn.Sequential, seed: int = 1) -> None:
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    model(inputs).square().sum().backward()


def gradients(model: nn.Sequential) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("bucket_elements", "sizes"),
    [(1, [2, 16, 8, 64, 8, 32]), (20, [18, 8, 64, 8, 32]), (64, [26, 64, 40]), (1000, [130])],
)
def test_gradients_become_the_mean_of_the_ranks(bucket_elements: int, sizes: list[int]) -> None:
    alone, _, _ = made(1)
    backward(alone)
    model, reducer, ring = made(bucket_elements)
    reducer.begin()
    backward(model)
    assert [tensor.numel() for tensor in ring.sent] == sizes, "from the top down, together up to so many elements"
    reducer.finish()
    for found, expected in zip(gradients(model), gradients(alone), strict=True):
        assert torch.equal(found, expected)


def test_only_what_adds_up_between_begin_and_finish_travels_and_once() -> None:
    model, reducer, ring = made(64)
    backward(model, seed=1)
    assert ring.sent == []
    reducer.begin()
    backward(model, seed=2)
    reducer.finish()
    assert len(ring.sent) == 3
    plain, _, _ = made(64)
    backward(plain, seed=1)
    backward(plain, seed=2)
    for found, expected in zip(gradients(model), gradients(plain), strict=True):
        assert torch.equal(found, expected)
    backward(model)
    assert len(ring.sent) == 3
    reducer.begin()
    backward(model)
    reducer.finish()
    assert len(ring.sent) == 6


def test_first_buckets_travel_before_the_backward_pass_is_over() -> None:
    model, reducer, ring = made(26)
    sent_at = []
    model[0].weight.register_post_accumulate_grad_hook(lambda _: sent_at.append(len(ring.sent)))
    reducer.begin()
    backward(model)
    assert sent_at[0] >= 2
    reducer.finish()


def test_gradients_are_divided_before_they_are_added_in_the_type_that_travels() -> None:
    model, reducer, ring = made(1000, torch.bfloat16)
    backward(model)
    expected = torch.cat([g.flatten() for g in reversed(gradients(model))]).bfloat16() / RANKS
    model.zero_grad(set_to_none=True)
    reducer.begin()
    backward(model)
    assert torch.equal(ring.copies[0], expected)
    reducer.finish()
    assert all(g.dtype == torch.float32 for g in gradients(model))


def test_a_parameter_without_a_gradient_is_noticed() -> None:
    model, reducer, _ = made(64)
    reducer.begin()
    model[2].bias.sum().backward()
    with pytest.raises(AssertionError, match="no gradient"):
        reducer.finish()


def test_nothing_travels_after_close() -> None:
    model, reducer, ring = made(64)
    reducer.begin()
    reducer.close()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    backward(model)
    assert ring.sent == []
