"""LAMB against algorithm 2 of its paper (arXiv:1904.00962), written out in numpy."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mslt.config import ModelConfig, OptimizerConfig
from mslt.engine.optimizer import Lamb, make_optimizer
from mslt.models import families
from mslt.models.freezing import freeze

CONFIG = OptimizerConfig(learning_rate=0.05, warmup_steps=0, weight_decay=0.1)


@dataclass
class PaperLamb:
    """One tensor, fp64."""

    x: np.ndarray
    weight_decay: float
    adapt: bool
    m: np.ndarray | float = 0.0
    v: np.ndarray | float = 0.0
    t: int = 0

    def step(self, g: np.ndarray, lr: float) -> None:
        self.t += 1
        self.m = 0.9 * self.m + (1 - 0.9) * g
        self.v = 0.999 * self.v + (1 - 0.999) * g**2
        m_hat = self.m / (1 - 0.9**self.t)
        v_hat = self.v / (1 - 0.999**self.t)
        r = m_hat / (np.sqrt(v_hat) + 1e-6)
        update = r + self.weight_decay * self.x
        x_norm, update_norm = np.sqrt((self.x**2).sum()), np.sqrt((update**2).sum())
        ratio = x_norm / update_norm if self.adapt and x_norm > 0 and update_norm > 0 else 1.0
        self.x = self.x - lr * ratio * update


class Weights(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        values = {"matrix": (5, 7), "cube": (2, 3, 4), "other": (3, 3), "bias": (7,), "norm": (5,)}
        for name, shape in values.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, dtype=dtype)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_steps_are_those_of_the_paper(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    weights = Weights(dtype)
    with torch.no_grad():
        weights.other.zero_()  # its norm is 0: ratio 1 in the first step
    optimizer = make_optimizer(weights, CONFIG)
    expected = {
        name: PaperLamb(p.detach().double().numpy().copy(), 0.1 if p.ndim > 1 else 0.0, p.ndim > 1)
        for name, p in weights.named_parameters()
    }
    for step in range(8):
        lr = 0.05 * (step + 1) / 8
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in weights.named_parameters():
            parameter.grad = torch.randn_like(parameter) * 10.0 ** (step % 3 - 1)
            if name == "cube" and step < 2:
                parameter.grad.zero_()
            expected[name].step(parameter.grad.double().numpy(), lr)
        optimizer.step()
        for name, parameter in weights.named_parameters():
            np.testing.assert_allclose(
                parameter.detach().double().numpy(), expected[name].x, rtol=tolerance, atol=tolerance, err_msg=name
            )
    for name, parameter in weights.named_parameters():
        state = optimizer.state[parameter]
        np.testing.assert_allclose(state["exp_avg"].double().numpy(), expected[name].m, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state["exp_avg_sq"].double().numpy(), expected[name].v, rtol=1e-4, atol=1e-5)
    assert [group["step"] for group in optimizer.param_groups] == [8, 8]


def test_matrices_move_by_a_share_of_their_own_norm() -> None:
    torch.manual_seed(1)
    weights = Weights(torch.float64)
    before = {name: p.detach().clone() for name, p in weights.named_parameters()}
    optimizer = make_optimizer(weights, CONFIG)
    for parameter in weights.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in weights.named_parameters():
        moved = (parameter.detach() - before[name]).norm()
        if parameter.ndim > 1:
            assert moved == pytest.approx(0.05 * before[name].norm())
        else:
            assert moved == pytest.approx(0.05 * len(parameter) ** 0.5, rel=1e-4), "Adam's first step: ±lr"


def test_without_gradient_and_decay_nothing_moves_and_nothing_is_nan() -> None:
    weights = Weights(torch.float32)
    before = {name: p.detach().clone() for name, p in weights.named_parameters()}
    optimizer = make_optimizer(weights, CONFIG.model_copy(update={"weight_decay": 0.0}))
    for parameter in weights.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in weights.named_parameters())


def test_zero_weights_learn() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 3))
    optimizer = Lamb([{"params": [weight]}], lr=0.1, beta1=0.9, beta2=0.999, eps=1e-6)
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.allclose(weight, torch.full((3, 3), -0.1), atol=1e-6)


def test_decay_and_adaptation_are_for_matrices_alone() -> None:
    optimizer = make_optimizer(Weights(torch.float32), CONFIG)
    settings = {
        p.ndim: (group["weight_decay"], group["adapt"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert settings == {3: (0.1, True), 2: (0.1, True), 1: (0.0, False)}


@pytest.mark.parametrize("seed", [0, 1])
def test_only_what_requires_a_gradient_is_held_and_moved(tiny_model: ModelConfig, seed: int) -> None:
    torch.manual_seed(seed)
    model = families.pretraining_model(families.hf_config(tiny_model, 4))
    freeze(model, ("layer.3", "pooler", "mlm_head", "nsp_head"))
    optimizer = make_optimizer(model, CONFIG)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
