"""Dropout on a CPU: the right share, the right expectation, independent, and the same wherever it is drawn again."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mslt.config import ModelConfig
from mslt.models import compiling, dropout, factory
from mslt.models.layer_stack import iter_hidden

SEED = 7


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_place_is_dropped_with_the_same_probability(p: float) -> None:
    print("seed", SEED)
    torch.manual_seed(SEED)
    num_draws = 4000
    masks = torch.stack([dropout.keep_mask(torch.empty(3, 7), p) for _ in range(num_draws)]).flatten(1)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    share = (masks == 0).double().mean(0)
    deviation = (p * (1 - p) / num_draws) ** 0.5
    assert (share - p).abs().max() < 5 * deviation, share  # 21 places, four of which share a draw
    correlation = torch.corrcoef((masks == 0).double().T) - torch.eye(21)
    assert correlation.abs().max() < 5 / num_draws**0.5, correlation.abs().max()


def test_a_probability_is_taken_to_a_65536th_and_the_expectation_stays() -> None:
    x = torch.ones(2_000_000, dtype=torch.float64)
    assert dropout.Dropout(1e-6)(x).eq(1).all()
    assert set(dropout.Dropout(1 - 1e-6)(x).unique().tolist()) == {0.0, 65536.0}
    torch.manual_seed(SEED)
    deviation = (0.1 / 0.9 / len(x)) ** 0.5
    assert dropout.Dropout(0.1)(x).mean().item() == pytest.approx(1, abs=5 * deviation)
    plain = nn.functional.dropout(torch.ones(1000).bfloat16(), 0.1).max()
    assert dropout.Dropout(0.1)(torch.ones(1000).bfloat16()).max() == plain, "the same rounding"


def test_attention_keeps_its_expectation_in_bf16() -> None:
    """The scale of dropout, 1.1111, is 1.1094 in bf16: attention must not take that."""
    torch.manual_seed(SEED)
    query, key = (torch.randn(32, 8, 64, 16).bfloat16() for _ in range(2))
    value, mask = torch.rand(32, 8, 64, 16).bfloat16(), torch.ones(32, 1, 64, 64, dtype=torch.bool)
    means = [
        dropout.attention(nn.Module(), query, key, value, mask, dropout=p, scaling=0.25)[0].double().mean().item()
        for p in (0.0, 0.1)
    ]
    assert means[1] == pytest.approx(means[0], rel=7e-4)


def test_the_gradient_passes_where_the_value_did() -> None:
    torch.manual_seed(SEED)
    x = torch.randn(64, 33, requires_grad=True)
    y = dropout.Dropout(0.3).train()(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y, x.detach() * x.grad, rtol=0, atol=0)
    assert 0.2 < (x.grad == 0).float().mean() < 0.4


def test_evaluation_changes_nothing() -> None:
    x = torch.randn(5)
    assert dropout.Dropout(0.3).eval()(x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradients_are_sdpas(dtype: torch.dtype) -> None:
    """With a dropout that drops nothing and yet takes the way of dropout. The tolerance is bf16's, or fp32's order of
    adding up."""
    torch.manual_seed(SEED)
    tensors = [torch.randn(2, 3, 8, 4).to(dtype).requires_grad_() for _ in range(3)]
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    mask[1, :, :, 5:] = False
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    results = {}
    for p in (0.0, 1e-6):
        out, _ = dropout.attention(nn.Module().train(), *tensors, mask, dropout=p, scaling=0.5)
        results[p] = [out, *torch.autograd.grad(out.float().square().sum(), tensors)]
    for expected, found in zip(results[0.0], results[1e-6], strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert results[1e-6][2][1, :, 5:].eq(0).all()  # a hidden key's gradient


def test_a_model_with_it_is_the_same_but_for_the_masks() -> None:
    config = ModelConfig(
        family="bert", vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    state = factory.initial_state(config, 2, seed=0)
    plain, ours = factory.build(config, 2, state), factory.build(config, 2, state)
    dropout.install(ours.eval())
    assert not any(module.training for module in ours.modules())
    assert not [module for module in ours.modules() if type(module) is nn.Dropout]
    assert len([module for module in ours.modules() if isinstance(module, dropout.Dropout)]) == len(
        [module for module in plain.modules() if isinstance(module, nn.Dropout)]
    )
    ids = torch.arange(40).view(2, 20)
    hidden = torch.ones(2, 20, dtype=torch.long)
    hidden[1, 12:] = 0
    expected, found = (model.eval()(input_ids=ids, attention_mask=hidden) for model in (plain, ours))
    assert found.prediction_logits.equal(expected.prediction_logits)
    torch.manual_seed(SEED)
    first = ours.train()(input_ids=ids, attention_mask=hidden).prediction_logits
    torch.manual_seed(SEED)
    assert ours(input_ids=ids, attention_mask=hidden).prediction_logits.equal(first)
    assert not first.equal(found.prediction_logits)
    own = ours.state_dict()
    assert own.keys() == plain.state_dict().keys()


def test_training_draws_no_mask_of_torchs() -> None:
    """One for the embeddings and three for each layer; attention has not fallen back to torch's."""
    config = ModelConfig(
        family="bert", vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = factory.build(config, 2, factory.initial_state(config, 2, seed=0))
    dropout.install(model)
    ids = torch.arange(40).view(2, 20)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        list(iter_hidden(model.train(), ids, torch.zeros_like(ids), torch.ones_like(ids)))
    calls = {event.key: event.count for event in profiled.key_averages()}
    assert calls["mslt::keep_mask"] == 1 + 3 * 2
    assert not [name for name in calls if "bernoulli" in name or "scaled_dot_product" in name]


def test_compiled_layers_draw_the_same_masks() -> None:
    why_not = compiling.why_no_compiler("cpu")
    if why_not is not None:
        pytest.skip(f"torch.compile does not work here: {why_not}")
    layer = nn.Sequential(nn.Linear(8, 8), dropout.Dropout(0.5), nn.Linear(8, 8), dropout.Dropout(0.5)).train()
    x = torch.randn(16, 8, requires_grad=True)
    inputs = [x, *layer.parameters()]

    def run() -> list[torch.Tensor]:
        torch.manual_seed(SEED)
        y = layer(x)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    eager = run()
    layer.compile(dynamic=False)
    for _ in range(2):
        for found, expected in zip(run(), eager, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
