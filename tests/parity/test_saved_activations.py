"""M10: a stage that trains the top quarter keeps at most 35 % of what a full step keeps for the backward pass."""

import pytest
import torch
from torch import nn

from benchmarks.checkpoint_cost import made_batch
from benchmarks.memory import (
    LARGEST_SHARE,
    SCHEDULES,
    TOP_QUARTER,
    Size,
    bytes_for_backward,
    loss_of,
    plan_of,
    saved_bytes,
)
from mslt.models import dropout, factory
from mslt.models.forward import PretrainingLoss
from mslt.models.freezing import freeze
from mslt.plan import Plan

SIZE = Size()  # that of M10: 12 layers × 256, 8,192 in the vocabulary
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def growing() -> Plan:
    return plan_of(SIZE, SCHEDULES["mslt"], "zero0_fp32")


@pytest.fixture(scope="module")
def full_bytes() -> int:
    return saved_bytes(plan_of(SIZE, SCHEDULES["full"], "zero0_fp32"), 0, CPU)


def test_top_quarter_saves_a_quarter(growing: Plan, full_bytes: int) -> None:
    assert [stage.depth for stage in growing.stages[: TOP_QUARTER + 1]] == [3, 6, 9, 12]
    first, second, top = (saved_bytes(growing, index, CPU) for index in (0, 1, TOP_QUARTER))
    print(f"saved for backward by stages 1, 2 and 4: {first:,}, {second:,}, {top:,}; by a full step {full_bytes:,}")
    assert top <= LARGEST_SHARE * full_bytes
    assert top == second, "frozen layers keep nothing, however many"
    assert top < first <= LARGEST_SHARE * full_bytes, "in stage 1 the embeddings train too"


def test_a_graph_through_frozen_layers_would_be_seen(growing: Plan, full_bytes: int) -> None:
    """What the tied embeddings would cost if they trained in stage 4: the gradient then passes every layer."""
    stage = growing.stages[TOP_QUARTER]
    model = factory.build(growing.model, stage.depth, factory.initial_state(growing.model, stage.depth, seed=0))
    dropout.install(model)
    freeze(model, (*stage.trainable, "embeddings"))
    module, batch = PretrainingLoss(model).train(), made_batch(growing, stage)
    assert bytes_for_backward(lambda: loss_of(module, batch), module.parameters()) > 2 * LARGEST_SHARE * full_bytes


def test_bytes_are_those_worked_out_by_hand() -> None:
    """Saved are the input [2, 4], for the weight's gradient, and the output of exp [2, 3]; not the weight, and neither
    twice when a second operation saves it too."""
    weight, x = nn.Parameter(torch.randn(4, 3)), torch.randn(2, 4)
    expected = 4 * (2 * 4 + 2 * 3)
    assert bytes_for_backward(lambda: (x @ weight).exp(), [weight]) == expected
    assert bytes_for_backward(lambda: (x @ weight).exp(), []) == expected, "without gradient for x no weight is saved"
    x.requires_grad_()
    assert bytes_for_backward(lambda: (x @ weight).exp(), [weight]) == expected
    assert bytes_for_backward(lambda: (x @ weight).exp(), []) == expected + 4 * 4 * 3

    def twice() -> torch.Tensor:
        h = (x @ weight).exp()
        return h.sin() + h.view(-1).cos().view(2, 3)

    assert bytes_for_backward(twice, [weight]) == expected
    assert bytes_for_backward(lambda: (x[:1] @ weight).exp(), [weight]) == 4 * (2 * 4 + 1 * 3), "a view keeps it whole"


def test_nothing_is_saved_without_a_graph() -> None:
    weight, x = nn.Parameter(torch.randn(4, 3)), torch.randn(2, 4)
    with torch.no_grad():
        assert bytes_for_backward(lambda: (x @ weight).exp(), [weight]) == 0
