"""Frozen matrix products in 8-bit integers, beside exact ones."""

from typing import Any

import pytest
import torch
from torch import nn

from mslt.config import parse_recipe
from mslt.engine.ds_config import read_engine_config
from mslt.errors import MsltError
from mslt.models.int8 import Int8Linear
from mslt.schedule import make_plan


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Int8Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 96)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    x = torch.randn(4, 8, 64, generator=generator) + 0.5  # a range that does not lie around 0
    return linear, Int8Linear(linear), x.to(dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_about_the_exact_product(dtype: torch.dtype) -> None:
    linear, low, x = pair(dtype)
    found, expected = low(x), linear(x.float())
    assert found.dtype == dtype
    assert found.shape == (4, 8, 96)
    assert 1e-4 < error(found.float(), expected) < 0.012


def test_scales_are_of_a_channel_and_of_a_token_alone() -> None:
    linear, low, x = pair()
    with torch.no_grad():
        linear.weight[3] *= 1000
        x[2, 5] *= 1000
        expected = linear(x)
        found = Int8Linear(linear)(x)
    others = [row for row in range(96) if row != 3]
    for rows in ([3], others):
        assert error(found[0][..., rows], expected[0][..., rows]) < 0.012, "neither another channel's nor token's scale"
    assert torch.equal(low(x)[:1], low(x[:1])), "the same bits in any batch"


def test_a_token_without_a_range_is_as_good() -> None:
    linear, low, _ = pair()
    assert torch.equal(low(torch.zeros(1, 1, 64)), linear.bias.expand(1, 1, 96))
    x = torch.full((1, 1, 64), 1.5)
    assert error(low(x), linear(x)) < 0.012


def test_it_holds_a_byte_a_weight_and_neither_parameters_nor_a_state() -> None:
    _, low, _ = pair()
    assert low.weight_NK.dtype == torch.int8
    assert not list(low.parameters())
    assert not low.state_dict()


def test_int8_goes_with_compiled_layers_and_without_partitions(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["schedule"]["frozen_precision"] = "int8"
    with pytest.raises(MsltError, match=r"schedule.frozen_precision: int8 is slower .* set training.compile: frozen"):
        parse_recipe(tiny_recipe, "recipe")
    tiny_recipe["training"]["compile"] = "frozen"
    recipe = parse_recipe(tiny_recipe, "recipe")
    said = r"\(ZeRO-3\) .*frozen_precision int8: write exact; training.compile frozen: write none, or take an engine"
    with pytest.raises(MsltError, match=said):
        make_plan(recipe, read_engine_config("zero3_fp32"))
    plan = make_plan(recipe, {})
    assert {stage.frozen_precision for stage in plan.stages} == {"int8"}
    assert plan.digest() != make_plan(recipe.model_copy(
        update={"schedule": recipe.schedule.model_copy(update={"frozen_precision": "exact"})}), {}
    ).digest(), "it decides what is learned"  # fmt: skip
