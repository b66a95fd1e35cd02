"""LAMB and AdamW: against algorithm 2 of LAMB's paper (arXiv:1904.00962) written out in numpy, against torch's AdamW
and clipping, and cut into partitions as ZeRO does against itself uncut."""

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from mslt.config import ModelConfig, OptimizerConfig
from mslt.engine import optimizer as optimizer_module
from mslt.engine.optimizer import CPU_CHUNK_ELEMENTS, Lamb, LossScale
from mslt.engine.pieces import Piece, whole_pieces
from mslt.models import families
from mslt.models.freezing import freeze

CONFIG = OptimizerConfig(learning_rate=0.05, warmup_steps=0, weight_decay=0.1)
CPU = torch.device("cpu")
Params = dict[str, torch.nn.Parameter]
VARIANTS: dict[str, dict[str, Any]] = {
    "of the paper": {},
    "other numbers": {"beta1": 0.8, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.0},
    "of the authors' BERT code": {"bias_correction": False},
    "with bounds": {"trust_ratio_bounds": (0.5, 0.9)},
    "with DeepSpeed's bounds": {"trust_ratio_bounds": (0.01, 10.0), "bias_correction": False},
    "NVIDIA's": {"normalize_gradient": True},
    "without a trust ratio": {"name": "adamw"},
}


@dataclass
class PaperLamb:
    """One tensor, fp64."""

    x: np.ndarray
    config: OptimizerConfig
    is_matrix: bool = True
    m: np.ndarray | float = 0.0
    v: np.ndarray | float = 0.0
    t: int = 0
    ratio: float = 1.0

    def step(self, g: np.ndarray, lr: float) -> None:
        beta1, beta2 = self.config.beta1, self.config.beta2
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        m_hat, v_hat = self.m, self.v
        if self.config.bias_correction:
            m_hat, v_hat = self.m / (1 - beta1**self.t), self.v / (1 - beta2**self.t)
        r = m_hat / (np.sqrt(v_hat) + self.config.eps)
        update = r + self.config.weight_decay * self.x if self.is_matrix else r
        x_norm, update_norm = np.sqrt((self.x**2).sum()), np.sqrt((update**2).sum())
        self.ratio = 1.0
        if self.is_matrix and self.config.name == "lamb" and x_norm > 0 and update_norm > 0:
            self.ratio = x_norm / update_norm
            if self.config.trust_ratio_bounds is not None:
                lowest, highest = self.config.trust_ratio_bounds
                self.ratio = min(max(self.ratio, lowest), highest)
        self.x = self.x - lr * self.ratio * update


def of_paper(weights: Params, config: OptimizerConfig) -> dict[str, PaperLamb]:
    return {n: PaperLamb(p.detach().double().numpy().copy(), config, p.ndim > 1) for n, p in weights.items()}


def some_weights(seed: int, dtype: torch.dtype = torch.float32) -> Params:
    """Matrices whose rows are of other sizes: a part of them has another norm for its number of elements."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"norm": (5,), "matrix": (5, 7), "cube": (4, 2, 3), "other": (3, 3), "bias": (7,), "last": (6, 5)}
    weights = {}
    for name, shape in shapes.items():
        rows = torch.logspace(-2, 0.5, shape[0], dtype=dtype).view(-1, *[1] * (len(shape) - 1))
        weights[name] = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype) * rows)
    return weights


def gradients(weights: Params, seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) * size for n, p in weights.items()}


def give(weights: Params, grads: dict[str, torch.Tensor]) -> None:
    for name, parameter in weights.items():
        parameter.grad = grads[name].clone()


def changed(**options: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate(CONFIG.model_dump() | options)


def matrices_of(weights: Params) -> list[str]:
    return [name for name, parameter in weights.items() if parameter.ndim > 1]


def lamb(weights: Params, config: OptimizerConfig = CONFIG, clip_norm: float = 0.0, **options: Any) -> Lamb:
    optimizer = Lamb(weights.values(), config, clip_norm, **options)
    optimizer.bind(whole_pieces(weights), matrices_of(weights), CPU)
    return optimizer


def values(weights: Params) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in weights.items()}


def moment(optimizer: Lamb, kind: str, name: str) -> torch.Tensor:
    (index,) = (i for i, piece in enumerate(optimizer.pieces) if piece.name == name)
    return optimizer.moments[kind][index]


# One process


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_steps_are_those_of_the_paper(dtype: torch.dtype, tolerance: float, variant: str) -> None:
    config = changed(**VARIANTS[variant])
    weights = some_weights(0, dtype)
    with torch.no_grad():
        weights["other"].zero_()  # its norm is 0: ratio 1 in the first step
    optimizer, expected, ratios = lamb(weights, config), of_paper(weights, config), set()
    for step in range(8):
        lr = 0.05 * (step + 1) / 8
        optimizer.param_groups[0]["lr"] = lr
        grads = gradients(weights, step, 10.0 ** (step % 3 - 1))
        if step < 2:
            grads["cube"].zero_()
        give(weights, grads)
        norm = np.sqrt(sum((g.double().numpy() ** 2).sum() for g in grads.values()))
        for name, paper in expected.items():
            paper.step(grads[name].double().numpy() / (norm if config.normalize_gradient else 1), lr)
        optimizer.step()
        assert optimizer.applied
        assert optimizer.gradient_norm is not None
        assert optimizer.gradient_norm.item() == pytest.approx(norm, rel=1e-6)
        for name, parameter in weights.items():
            found = parameter.detach().double().numpy()
            np.testing.assert_allclose(found, expected[name].x, rtol=tolerance, atol=tolerance, err_msg=name)
        if config.name == "lamb":
            assert optimizer.trust_ratios is not None
            ratios |= set(optimizer.trust_ratios.tolist())
            assert optimizer.trust_ratios.tolist() == pytest.approx(
                [expected[name].ratio for name in matrices_of(weights)], rel=max(tolerance, 1e-9)
            )
        else:
            assert optimizer.trust_ratios is None
    for name in weights:
        for kind, paper in (("exp_avg", expected[name].m), ("exp_avg_sq", expected[name].v)):
            held = moment(optimizer, kind, name).double().numpy()
            np.testing.assert_allclose(held, np.ravel(paper), rtol=30 * tolerance, atol=3 * tolerance)
    assert optimizer.steps == [8] * 6
    if variant == "with bounds":
        rounded = {round(ratio, 6) for ratio in ratios}
        assert {0.5, 0.9, 1.0} <= rounded, "both bounds were met, and 1 where the weights are 0"
        assert all(0.5 <= ratio <= 0.9 for ratio in rounded - {1.0})


def test_matrices_move_by_a_share_of_their_own_norm() -> None:
    weights = some_weights(1, torch.float64)
    before = values(weights)
    give(weights, gradients(weights, 1))
    lamb(weights).step()
    for name, parameter in weights.items():
        moved = (parameter.detach() - before[name]).norm()
        if parameter.ndim > 1:
            assert moved == pytest.approx(0.05 * before[name].norm())
        else:
            assert moved == pytest.approx(0.05 * len(parameter) ** 0.5, rel=1e-4), "Adam's first step: ±lr"


@pytest.mark.parametrize("options", [{}, {"normalize_gradient": True}, {"name": "adamw"}])
def test_without_gradient_and_decay_nothing_moves_and_nothing_is_nan(options: dict[str, Any]) -> None:
    weights = some_weights(2)
    before = values(weights)
    optimizer = lamb(weights, changed(weight_decay=0.0, **options), clip_norm=1.0)
    for _ in range(2):
        give(weights, {name: torch.zeros_like(p) for name, p in weights.items()})
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in weights.items())


@pytest.mark.parametrize("bounds", [None, (0.01, 10.0), (2.0, 10.0), (0.1, 0.5)])
def test_zero_weights_learn_at_ratio_1_whatever_the_bounds(bounds: tuple[float, float] | None) -> None:
    weights = {"a": torch.nn.Parameter(torch.zeros(3, 3))}
    optimizer = lamb(weights, changed(learning_rate=0.1, trust_ratio_bounds=bounds))
    give(weights, {"a": torch.ones(3, 3)})
    optimizer.step()
    assert torch.allclose(weights["a"], torch.full((3, 3), -0.1), atol=1e-6)


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_decay_is_for_matrices_alone(name: str) -> None:
    weights = some_weights(3)
    before = values(weights)
    give(weights, {name: torch.zeros_like(p) for name, p in weights.items()})
    lamb(weights, changed(name=name)).step()
    for key, parameter in weights.items():
        # Adam's direction is 0, so the update is decay alone: LAMB's ratio then is 1 / decay.
        shrunk = 0.05 * (1.0 if name == "lamb" else 0.1) if parameter.ndim > 1 else 0.0
        torch.testing.assert_close(parameter.detach(), before[key] * (1 - shrunk), msg=key)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(dtype: torch.dtype, tolerance: float, weight_decay: float) -> None:
    ours, torchs = some_weights(4, dtype), some_weights(4, dtype)
    config = changed(name="adamw", weight_decay=weight_decay, beta2=0.99)
    optimizer = lamb(ours, config)
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in torchs.values() if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in torchs.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    for step in range(10):
        grads = gradients(ours, step, 10.0 ** (step % 3 - 1))
        give(ours, grads)
        give(torchs, grads)
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 0.02 * (step + 1) / 10
        optimizer.step()
        reference.step()
        for name in ours:
            torch.testing.assert_close(ours[name], torchs[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("clip_norm", [0.0, 0.3, 1.0, 1e6])
@pytest.mark.parametrize("scale", [None, 2.0**16])
def test_clipping_is_torchs(clip_norm: float, scale: float | None) -> None:
    ours, torchs = some_weights(5), some_weights(5)
    grads = gradients(ours, 5)
    give(torchs, grads)
    norm = clip_grad_norm_(torchs.values(), clip_norm or float("inf"))
    give(ours, {name: grad * (scale or 1.0) for name, grad in grads.items()})
    # With beta1 0 the first moment is the gradient that the update is made of.
    optimizer = lamb(ours, changed(beta1=0.0), clip_norm, loss_scale=scale and LossScale(scale))
    optimizer.step()
    assert optimizer.gradient_norm is not None
    assert norm > 1.0
    assert optimizer.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-6), "before clipping"
    for name in ours:
        grad = moment(optimizer, "exp_avg", name).view_as(grads[name])
        torch.testing.assert_close(grad, torchs[name].grad, rtol=1e-6, atol=0.0)
        assert torch.equal(grad, grads[name]) == (clip_norm in (0.0, 1e6)), "untouched where it is short enough"


def test_a_normalized_gradient_is_not_clipped() -> None:
    updates = []
    for clip_norm in (0.0, 1e-3):
        weights = some_weights(6)
        give(weights, gradients(weights, 6))
        optimizer = lamb(weights, changed(normalize_gradient=True, eps=0.1, beta1=0.0), clip_norm)
        optimizer.step()
        norm = torch.stack([grad.norm() for grad in optimizer.moments["exp_avg"]]).norm()
        assert norm.item() == pytest.approx(1.0, rel=1e-6)
        updates.append(values(weights))
    assert all(torch.equal(updates[0][name], updates[1][name]) for name in updates[0])


# Cut into chunks that stay in a CPU's cache


def plain_step(
    weights: dict[str, torch.Tensor],
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]],
    grads: dict[str, torch.Tensor],
    config: OptimizerConfig,
    clip_norm: float,
    scale: float,
    steps: int,
    lr: float,
) -> None:
    """What `Lamb.step` computes, one operation after the other on whole tensors, each result in new memory but for
    weights and moments."""
    norms = [torch.linalg.vector_norm(grads[name]) for name in sorted(grads, key=lambda name: grads[name].ndim == 1)]
    norm = torch.stack([torch.zeros(()), *norms]).square().sum().sqrt()
    factor = torch.ones(())
    if config.normalize_gradient:
        factor = 1 / (norm / scale)
    elif clip_norm > 0:
        factor = (clip_norm / (norm / scale + 1e-6)).clamp(max=1.0)
    for name, weight in weights.items():
        (m, v), grad = moments[name], grads[name] * (factor / scale)
        m.lerp_(grad, 1 - config.beta1)
        v.mul_(config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
        corrections = (1 - config.beta1**steps, 1 - config.beta2**steps) if config.bias_correction else (1.0, 1.0)
        update = (m / corrections[0]) / ((v / corrections[1]).sqrt() + config.eps)
        if grad.ndim > 1:
            update = update.add(weight, alpha=config.weight_decay)
            if config.name == "lamb":
                weight_norm, update_norm = (torch.linalg.vector_norm(x).square().sqrt() for x in (weight, update))
                ratio = weight_norm / update_norm
                if config.trust_ratio_bounds is not None:
                    ratio = ratio.clamp(*config.trust_ratio_bounds)
                update = update * torch.where((weight_norm > 0) & (update_norm > 0), ratio, 1.0)
        weight.add_(update, alpha=-lr)


@pytest.mark.parametrize("chunk_elements", [1, 8, 24, CPU_CHUNK_ELEMENTS])
@pytest.mark.parametrize(("clip_norm", "scale"), [(1.0, None), (0.0, None), (0.0, 512.0), (1.0, 512.0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_give_the_bits_of_whole_tensors(
    variant: str, clip_norm: float, scale: float | None, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_module, "CPU_CHUNK_ELEMENTS", chunk_elements)
    refuse_other_bits(some_weights(17), changed(**VARIANTS[variant]), clip_norm, scale)


@pytest.mark.parametrize("variant", ["of the paper", "without a trust ratio"])
def test_chunks_of_real_size_give_the_bits_of_whole_tensors(variant: str) -> None:
    shapes = {"embeddings": (1401, 768), "norm": (768,), "one": (768, 768), "two": (768, 768), "bias": (3072,)}
    assert 2 * CPU_CHUNK_ELEMENTS < 1401 * 768 < 3 * CPU_CHUNK_ELEMENTS
    generator = torch.Generator().manual_seed(18)
    weights = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    refuse_other_bits(weights, changed(**VARIANTS[variant]), clip_norm=1.0, scale=None)


def refuse_other_bits(weights: Params, config: OptimizerConfig, clip_norm: float, scale: float | None) -> None:
    """Three steps of Lamb against three plain ones."""
    expected = values(weights)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    optimizer = lamb(weights, config, clip_norm, loss_scale=scale and LossScale(scale))
    for step in range(3):
        grads = gradients(weights, step, (scale or 1.0) * 10.0 ** (step - 1))
        give(weights, grads)
        optimizer.step()
        plain_step(expected, moments, grads, config, clip_norm, scale or 1.0, step + 1, lr=0.05)
        for name, weight in weights.items():
            assert torch.equal(weight, expected[name]), (step, name)
            for kind, held in zip(("exp_avg", "exp_avg_sq"), moments[name], strict=True):
                assert torch.equal(moment(optimizer, kind, name).view_as(held), held), (step, name, kind)


# Before bind


def test_before_bind_a_step_changes_nothing() -> None:
    # deepspeed.initialize takes steps of its own, with zero gradients; decay alone would move the weights.
    weights = some_weights(7)
    before = values(weights)
    optimizer = Lamb(weights.values(), CONFIG, 1.0)
    for grads in (None, {name: torch.zeros_like(p) for name, p in weights.items()}, gradients(weights, 7)):
        if grads is not None:
            give(weights, grads)
        optimizer.step()
        assert not optimizer.applied
        assert optimizer.gradient_norm is None
    assert all(torch.equal(p, before[name]) for name, p in weights.items())
    optimizer.bind(whole_pieces(weights), matrices_of(weights), CPU)
    assert optimizer.steps == [0] * 6
    assert not any(held.any() for kind in optimizer.moments.values() for held in kind)
    once = some_weights(7)
    give(once, gradients(once, 7))
    lamb(once, clip_norm=1.0).step()
    optimizer.step()
    assert optimizer.applied
    assert all(torch.equal(p, once[name]) for name, p in weights.items())


def test_a_parameter_without_gradient_is_named() -> None:
    weights = some_weights(8)
    give(weights, gradients(weights, 8))
    weights["cube"].grad = None
    with pytest.raises(AssertionError, match="cube has no gradient"):
        lamb(weights).step()


@pytest.mark.parametrize("seed", [0, 1])
def test_only_what_requires_a_gradient_is_held_and_moved(tiny_model: ModelConfig, seed: int) -> None:
    torch.manual_seed(seed)
    model = families.pretraining_model(families.hf_config(tiny_model, 4))
    freeze(model, ("layer.3", "pooler", "mlm_head", "nsp_head"))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = lamb(trainable)
    assert sorted(piece.name for piece in optimizer.pieces) == sorted(trainable)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


# Loss scale, and gradients that are not finite


def test_loss_scale_halves_at_once_and_doubles_after_an_interval() -> None:
    scale = LossScale(8.0, growth_interval=3)
    seen = []
    for finite in (True, True, False, True, True, True, True, True, True, False, False, True):
        scale.update(finite)
        seen.append((scale.value, scale.good_steps))
    assert seen == [
        *[(8.0, 1), (8.0, 2), (4.0, 0)],  # a bad step begins the count anew
        *[(4.0, 1), (4.0, 2), (8.0, 0), (8.0, 1), (8.0, 2), (16.0, 0)],
        *[(8.0, 0), (4.0, 0), (4.0, 1)],
    ]
    assert LossScale(**scale.state()) == scale
    assert (LossScale().value, LossScale().growth_interval) == (65536.0, 2000)


@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
@pytest.mark.parametrize("options", [{}, {"normalize_gradient": True}])
def test_a_scaled_loss_gives_the_same_update_bit_for_bit(clip_norm: float, options: dict[str, Any]) -> None:
    plain, scaled = some_weights(9), some_weights(9)
    scale = LossScale(2.0**16)
    optimizers = (
        lamb(plain, changed(**options), clip_norm),
        lamb(scaled, changed(**options), clip_norm, loss_scale=scale),
    )
    for step in range(4):
        scale.value = 2.0 ** (16 - step)  # a power of two: no digit is lost
        grads = gradients(plain, step)
        give(plain, grads)
        give(scaled, {name: grad * scale.value for name, grad in grads.items()})
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(plain[name], scaled[name]) for name in plain), step
        assert torch.equal(*(optimizer.gradient_norm for optimizer in optimizers)), step


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["matrix", "bias"])
@pytest.mark.parametrize("options", [{"loss_scale": LossScale(1024.0)}, {"leaves_out_bad_steps": True}])
def test_a_gradient_that_is_not_finite_is_left_out(bad: float, where: str, options: dict[str, Any]) -> None:
    weights, control = some_weights(10), some_weights(10)
    optimizers = [lamb(held, clip_norm=1.0, **copy.deepcopy(options)) for held in (weights, control)]
    for step in range(4):
        grads = gradients(weights, step, 1024.0)
        if step % 2:
            give(weights, grads | {where: grads[where].index_fill(0, torch.tensor([2]), bad)})
            optimizers[0].step()
            assert not optimizers[0].applied
            assert optimizers[0].gradient_norm is not None
            assert not optimizers[0].gradient_norm.isfinite()
        else:
            for held, optimizer in zip((weights, control), optimizers, strict=True):
                give(held, grads)
                optimizer.step()
                assert optimizer.applied
        assert all(torch.equal(weights[name], control[name]) for name in weights)
        assert optimizers[0].steps == optimizers[1].steps == [step // 2 + 1] * 6
        for kind in optimizers[0].moments:
            assert all(torch.equal(moment(optimizers[0], kind, n), moment(optimizers[1], kind, n)) for n in weights)
    assert optimizers[0].loss_scale == optimizers[1].loss_scale, "the engine's to change"


def test_where_nothing_is_left_out_a_bad_gradient_shows() -> None:
    weights = some_weights(11)
    grads = gradients(weights, 11)
    give(weights, grads | {"matrix": grads["matrix"] * float("inf")})
    optimizer = lamb(weights)
    optimizer.step()
    assert optimizer.applied
    assert optimizer.gradient_norm is not None
    assert not optimizer.gradient_norm.isfinite(), "the loop ends the run by it"
    assert weights["matrix"].isnan().any()


# State that was carried


def test_every_tensor_is_corrected_for_its_own_number_of_steps() -> None:
    weights = some_weights(12, torch.float64)
    optimizer, expected = lamb(weights), of_paper(weights, CONFIG)
    carried = {"matrix": 10, "bias": 3}
    for index, piece in enumerate(optimizer.pieces):
        if piece.name not in carried:
            continue
        generator = torch.Generator().manual_seed(carried[piece.name])
        for kind in ("exp_avg", "exp_avg_sq"):
            optimizer.moments[kind][index].copy_(torch.rand(piece.numel, generator=generator, dtype=torch.float64))
        optimizer.steps[index] = carried[piece.name]
        paper = expected[piece.name]
        paper.m, paper.v = (optimizer.moments[kind][index].numpy().reshape(paper.x.shape).copy() for kind in
                            ("exp_avg", "exp_avg_sq"))  # fmt: skip
        paper.t = carried[piece.name]
    for step in range(3):
        grads = gradients(weights, step)
        give(weights, grads)
        optimizer.step()
        for name, paper in expected.items():
            paper.step(grads[name].numpy(), 0.05)
            np.testing.assert_allclose(weights[name].detach().numpy(), paper.x, rtol=1e-12, atol=1e-12, err_msg=name)
    steps = {piece.name: steps for piece, steps in zip(optimizer.pieces, optimizer.steps, strict=True)}
    assert steps == {name: carried.get(name, 0) + 3 for name in weights}


# Cut into partitions


class Ranks:
    """Ranks as threads. `sum(rank)` adds over all of them and waits for all, as an all-reduce does."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = Barrier(size, timeout=60)
        self.given: list[torch.Tensor] = [torch.empty(0)] * size

    def sum(self, rank: int) -> Callable[[torch.Tensor], None]:
        def add(tensor: torch.Tensor) -> None:
            self.given[rank] = tensor.clone()
            self.barrier.wait()
            total = torch.stack([given.double() for given in self.given]).sum(0)
            self.barrier.wait()
            tensor.copy_(total)

        return add

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        def guarded(rank: int) -> Any:
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()  # the others wait no longer
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, range(self.size)))


def flattened(tensors: Iterable[torch.Tensor], numel: int) -> torch.Tensor:
    """End to end, padded."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    return torch.cat([flat, flat.new_zeros(numel - len(flat))])


def cut(weights: Params, borders: list[int]) -> list[list[Piece]]:
    """For each rank its pieces of the flattened weights, from its border to the next: what ZeRO-1 and 2 hold."""
    flat = flattened(weights.values(), borders[-1])
    ranks = []
    for begin, end in pairwise(borders):
        holder, pieces, first = torch.nn.Parameter(flat[begin:end].clone()), [], 0
        for name, parameter in weights.items():
            low, high = max(first, begin), min(first + parameter.numel(), end)
            if low < high:
                pieces.append(Piece(name, low - first, high - low, holder, low - begin, parameter.ndim > 1))
            first += parameter.numel()
        ranks.append(pieces)
    return ranks


def equal_borders(weights: Params, world_size: int) -> list[int]:
    part = -(-sum(p.numel() for p in weights.values()) // (2 * world_size)) * 2  # ZeRO's: an even number of elements
    return [part * rank for rank in range(world_size + 1)]


def joined(ranks: list[list[Piece]], weights: Params, read: Callable[[Piece], torch.Tensor]) -> dict[str, torch.Tensor]:
    """What all ranks hold of each tensor, in one; every element held once."""
    found = {name: torch.full((p.numel(),), float("nan"), dtype=p.dtype) for name, p in weights.items()}
    for piece in (piece for pieces in ranks for piece in pieces):
        place = found[piece.name].narrow(0, piece.start, piece.numel)
        assert place.isnan().all()
        place.copy_(read(piece))
    return {name: tensor.view(weights[name].shape) for name, tensor in found.items()}


def train_cut(
    weights: Params,
    borders: list[int],
    grads: list[dict[str, torch.Tensor]],
    config: OptimizerConfig,
    clip_norm: float = 1.0,
    adds: bool = True,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], list[Lamb]]:
    """One optimizer for each rank, all at once, each with its part of the gradients. Weights, optimizers."""
    ranks, pieces = Ranks(len(borders) - 1), cut(weights, borders)

    def work(rank: int) -> Lamb:
        holder = pieces[rank][0].holder if pieces[rank] else torch.nn.Parameter(torch.zeros(2))
        optimizer = Lamb([holder], config, clip_norm, **copy.deepcopy(options))
        optimizer.bind(pieces[rank], matrices_of(weights), CPU, ranks.sum(rank) if adds else None)
        for step in grads:
            if pieces[rank]:
                holder.grad = flattened(step.values(), borders[-1])[borders[rank] : borders[rank + 1]].clone()
            optimizer.step()
        return optimizer

    optimizers = ranks.run(work)
    return joined(pieces, weights, Piece.weight), optimizers


def train_whole(
    weights: Params,
    grads: list[dict[str, torch.Tensor]],
    config: OptimizerConfig,
    clip_norm: float = 1.0,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], Lamb]:
    copied = {name: torch.nn.Parameter(p.detach().clone()) for name, p in weights.items()}
    optimizer = lamb(copied, config, clip_norm, **copy.deepcopy(options))
    for step in grads:
        give(copied, step)
        optimizer.step()
    return values(copied), optimizer


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], weights: Params) -> dict[str, float]:
    """Of each tensor, the norm of what its update differs by, over the norm of the update."""
    before = {name: p.detach().double() for name, p in weights.items()}
    return {
        name: (
            (found[name].double() - wanted[name].double()).norm() / (wanted[name].double() - before[name]).norm()
        ).item()
        for name in weights
    }


@pytest.fixture(scope="session")
def bert(tiny_model: ModelConfig) -> Params:
    torch.manual_seed(13)
    return dict(families.pretraining_model(families.hf_config(tiny_model, 2)).named_parameters())


def bert_gradients(weights: Params, steps: int) -> list[dict[str, torch.Tensor]]:
    return [gradients(weights, 100 + step, 10.0**-step) for step in range(steps)]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_partitions_give_the_update_of_whole_tensors(bert: Params, world_size: int, variant: str) -> None:
    config, grads, borders = changed(**VARIANTS[variant]), bert_gradients(bert, 4), equal_borders(bert, world_size)
    expected, whole = train_whole(bert, grads, config)
    found, optimizers = train_cut(bert, borders, grads, config)
    assert max(difference(found, expected, bert).values()) < 2e-6
    assert len({piece.name for optimizer in optimizers for piece in optimizer.pieces}) == len(bert)
    is_cut = [sum(piece.name == name for o in optimizers for piece in o.pieces) > 1 for name in matrices_of(bert)]
    assert any(is_cut), "or nothing would be tried"
    for optimizer in optimizers:
        assert whole.gradient_norm is not None
        assert optimizer.gradient_norm is not None
        assert optimizer.gradient_norm.item() == pytest.approx(whole.gradient_norm.item(), rel=1e-6)
        if config.name == "lamb":
            assert whole.trust_ratios is not None
            assert optimizer.trust_ratios is not None
            torch.testing.assert_close(optimizer.trust_ratios, whole.trust_ratios, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("seed", range(6))
def test_partitions_may_be_cut_anywhere(seed: int) -> None:
    weights = some_weights(seed, torch.float64)
    total = sum(p.numel() for p in weights.values())
    world_size = 2 + seed % 4
    inner = torch.randint(0, total + 1, (world_size - 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    borders = [0, *sorted(inner), total]
    print(f"seed {seed}: borders {borders}")
    grads = [gradients(weights, step) for step in range(4)]
    expected, whole = train_whole(weights, grads, CONFIG)
    found, optimizers = train_cut(weights, borders, grads, CONFIG)
    assert max(difference(found, expected, weights).values()) < 1e-12
    held = {id(piece): (o.moments, i) for o in optimizers for i, piece in enumerate(o.pieces)}

    def of_piece(kind: str, piece: Piece) -> torch.Tensor:
        moments, index = held[id(piece)]
        return moments[kind][index]

    for kind in ("exp_avg", "exp_avg_sq"):
        parts = joined([optimizer.pieces for optimizer in optimizers], weights, partial(of_piece, kind))
        for name in weights:
            torch.testing.assert_close(parts[name].flatten(), moment(whole, kind, name), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("borders", [[0, 5, 112, 112], [0, 5, 5, 112], [0, 2, 112, 140], [0, 0, 112, 112]])
def test_a_rank_may_hold_vectors_alone_or_nothing(borders: list[int]) -> None:
    weights = {name: p for name, p in some_weights(14).items() if name != "bias"}
    assert sum(p.numel() for p in weights.values()) < 112, "the rest is padding"
    grads = [gradients(weights, step) for step in range(3)]
    for options in ({}, {"name": "adamw"}, {"normalize_gradient": True}, {"weight_decay": 0.0}):
        expected, _ = train_whole(weights, grads, changed(**options))
        found, optimizers = train_cut(weights, borders, grads, changed(**options))
        assert max(difference(found, expected, weights).values()) < 2e-6
        assert all(optimizer.applied for optimizer in optimizers)
    held = [{piece.is_matrix for piece in optimizer.pieces} for optimizer in optimizers]
    assert {False} in held or set() in held


def one_ratio_for_each_partition(
    weights: Params, borders: list[int], grads: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The trap: LAMB given ZeRO's partitions as they are, each as if it were one matrix."""
    flat = flattened(weights.values(), borders[-1]).double().numpy()
    parts = [PaperLamb(flat[begin:end].copy(), CONFIG) for begin, end in pairwise(borders)]
    for step in grads:
        flat_grad = flattened(step.values(), borders[-1]).double()
        flat_grad *= min(1.0, 1.0 / (flat_grad.norm().item() + 1e-6))
        for begin, part in zip(borders[:-1], parts, strict=True):
            part.step(flat_grad.numpy()[begin : begin + len(part.x)], 0.05)
    together, found, first = torch.from_numpy(np.concatenate([part.x for part in parts])), {}, 0
    for name, parameter in weights.items():
        found[name] = together[first : first + parameter.numel()].view(parameter.shape)
        first += parameter.numel()
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_ratio_for_each_partition_would_be_another_optimizer(bert: Params, world_size: int) -> None:
    # What the two tests above tell apart: by the same measure, naive LAMB is far off.
    grads, borders = bert_gradients(bert, 4), equal_borders(bert, world_size)
    expected, _ = train_whole(bert, grads, CONFIG)
    naive = difference(one_ratio_for_each_partition(bert, borders, grads), expected, bert)
    assert sum(far > 0.05 for far in naive.values()) > 0.9 * len(naive), naive


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_norms_of_pieces_that_are_not_summed_would_be_another_optimizer(world_size: int) -> None:
    weights = some_weights(15)
    grads = [gradients(weights, step) for step in range(4)]
    expected, _ = train_whole(weights, grads, CONFIG)
    borders = equal_borders(weights, world_size)
    found, _ = train_cut(weights, borders, grads, CONFIG)
    assert max(difference(found, expected, weights).values()) < 2e-6
    alone, _ = train_cut(weights, borders, grads, CONFIG, adds=False)
    assert max(difference(alone, expected, weights).values()) > 0.05


@pytest.mark.parametrize("options", [{"loss_scale": LossScale(16.0)}, {"leaves_out_bad_steps": True}])
@pytest.mark.parametrize("where", ["norm", "last"])
def test_all_ranks_leave_a_step_out_that_is_bad_on_one(options: dict[str, Any], where: str) -> None:
    weights = some_weights(16)
    good, bad = gradients(weights, 0), gradients(weights, 1)
    bad[where].view(-1)[-1] = float("inf")
    borders = equal_borders(weights, 3)
    expected, _ = train_whole(weights, [good], CONFIG, **options)
    found, optimizers = train_cut(weights, borders, [good, bad], CONFIG, **options)
    assert [optimizer.applied for optimizer in optimizers] == [False] * 3
    assert max(difference(found, expected, weights).values()) < 2e-6
    assert all(steps == 1 for optimizer in optimizers for steps in optimizer.steps)
