"""NVIDIA's FusedLAMB: refused where it is absent or wrong, shown to be equal where it is there.

What FusedLAMB's interface does is stood in for by `Standin`, which only a GPU machine with apex can confirm: the test
marked `gpu` does.
"""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from mslt.config import OptimizerConfig, parse_recipe
from mslt.engine import apex
from mslt.engine.ds_config import read_engine_config
from mslt.engine.optimizer import refuse_unequal_apex
from mslt.errors import MsltError
from mslt.schedule import make_plan

CONFIG = OptimizerConfig(learning_rate=0.01, warmup_steps=0, weight_decay=0.1, implementation="apex")
CPU = torch.device("cpu")


class Standin(torch.optim.Optimizer):
    """apex.optimizers.FusedLAMB in plain torch, tensor by tensor: a group's `step` counts up before the update, the
    ratio is taken where weights decay, state is made where there is none."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.01,
        max_grad_norm: float = 1.0, use_nvlamb: bool = False,
    ) -> None:  # fmt: skip
        assert max_grad_norm > 1e20, "clipped twice"
        assert not use_nvlamb
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.bias_correction, self.betas, self.eps = bias_correction, betas, eps

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                m = state["exp_avg"].mul_(self.betas[0]).add_(p.grad, alpha=1 - self.betas[0])
                v = state["exp_avg_sq"].mul_(self.betas[1]).addcmul_(p.grad, p.grad, value=1 - self.betas[1])
                first, second = (1 - b ** group["step"] if self.bias_correction else 1.0 for b in self.betas)
                update = (m / first) / ((v / second).sqrt() + self.eps) + group["weight_decay"] * p
                ratio = (p.norm() / update.norm()).item() if group["weight_decay"] else 1.0
                p.sub_(update, alpha=group["lr"] * ratio)


class Wrong(Standin):
    """As DeepSpeed's FusedLamb does it: bias correction as a factor on the whole step."""

    def step(self, closure: Any = None) -> None:
        self.bias_correction = False
        steps = self.param_groups[0].get("step", 0) + 1
        factor = math.sqrt(1 - self.betas[1] ** steps) / (1 - self.betas[0] ** steps)
        for group in self.param_groups:
            group["lr"] *= factor
        super().step()


def test_without_apex_it_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex, "FusedLAMB", None)
    with pytest.raises(MsltError, match=r"apex is not installed .* write `foreach`"):
        refuse_unequal_apex(CONFIG, CPU)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_what_keeps_to_the_paper_is_taken(monkeypatch: pytest.MonkeyPatch, bias_correction: bool) -> None:
    monkeypatch.setattr(apex, "FusedLAMB", Standin)
    refuse_unequal_apex(CONFIG.model_copy(update={"bias_correction": bias_correction}), CPU)


def test_what_makes_another_update_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex, "FusedLAMB", Wrong)
    with pytest.raises(MsltError, match="makes another update than LAMB's paper"):
        refuse_unequal_apex(CONFIG, CPU)


@pytest.mark.parametrize(
    ("engine", "state"), [("zero1_fp32", "reset"), ("zero3_bf16", "reset"), ("zero0_fp32", "carry")]
)
def test_a_plan_that_it_would_train_wrongly_is_refused(tiny_recipe: dict[str, Any], engine: str, state: str) -> None:
    tiny_recipe["engine"] = engine
    tiny_recipe["optimizer"]["implementation"] = "apex"
    tiny_recipe["schedule"]["optimizer_state"] = state
    recipe = parse_recipe(tiny_recipe, "recipe for tests")
    with pytest.raises(MsltError, match=r"implementation apex: makes another update with .*; write foreach"):
        make_plan(recipe, read_engine_config(engine))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or apex.FusedLAMB is None, reason="needs a GPU and NVIDIA's apex")
def test_the_one_installed_makes_our_update() -> None:
    refuse_unequal_apex(CONFIG, torch.device("cuda"))
