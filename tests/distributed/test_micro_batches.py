"""The micro-batch that is measured before a run: which one is taken, and that the run directory keeps it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mslt import measure
from mslt.config import parse_recipe
from mslt.engine.engine import Workers
from mslt.errors import MsltError
from mslt.measure import fastest_micro_batches
from mslt.plan import Plan
from mslt.preflight import open_recipe
from mslt.rundir import RunDir, read_plan
from mslt.schedule import make_plan
from tests.distributed.probe import alone
from tests.distributed.runs import mslt, write_recipe


@pytest.fixture
def worker() -> Iterator[Workers]:
    with alone() as workers:
        yield workers


@pytest.fixture
def auto(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    return {**tiny_recipe, "training": {**tiny_recipe["training"], "micro_batch_size": "auto"}}


OUT_OF_MEMORY = None
MILLISECONDS = {  # a sample, by micro-batch → what is taken
    1: [{1: 8, 2: 5, 4: 3, 8: 2}, 8],
    2: [{1: 8, 2: 5, 4: 4.95, 8: 2}, 2],  # 4 gains 1 %: no larger one is tried
    3: [{1: 8, 2: 9}, 1],
    4: [{1: 8, 2: 5, 4: OUT_OF_MEMORY}, 2],
}


@pytest.mark.parametrize(("by_size", "taken"), MILLISECONDS.values(), ids=["all", "no gain", "slower", "memory"])
def test_sizes_double_until_memory_ends_or_nothing_is_gained(
    tiny_plan: Plan, shards: Path, worker: Workers, monkeypatch: pytest.MonkeyPatch, by_size: dict[int, Any], taken: int
) -> None:
    tried = []

    def sample_seconds(engine: Any, batch: dict[str, torch.Tensor]) -> float:
        size = engine.micro_batch_size
        assert len(batch["input_ids"]) == min(2 * size, 8), "the second finds gradients in memory"
        tried.append(size)
        if by_size[size] is OUT_OF_MEMORY:
            raise torch.OutOfMemoryError("of a test")
        return float(by_size[size]) / 1000

    monkeypatch.setattr(measure, "_sample_seconds", sample_seconds)
    plan = tiny_plan.model_copy(update={"stages": tiny_plan.stages[:1]})
    assert fastest_micro_batches(plan, shards, worker) == [taken]
    assert tried == list(by_size)[: len(tried)]
    assert len(tried) == min(len(by_size), list(by_size).index(taken) + 2)


def test_memory_for_not_even_one_sample_is_an_error(
    tiny_plan: Plan, shards: Path, worker: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample_seconds(*_: Any) -> float:
        raise torch.OutOfMemoryError("of a test")

    monkeypatch.setattr(measure, "_sample_seconds", sample_seconds)
    with pytest.raises(MsltError, match=r"stage 1: not even one sample of 32 tokens fits .* take a smaller model"):
        fastest_micro_batches(tiny_plan, shards, worker)


def test_every_stage_is_measured_and_its_batch_a_multiple(
    tiny_sections: dict[str, Any], shards: Path, worker: Workers
) -> None:
    sections = {**tiny_sections, "training": {**tiny_sections["training"], "batch_size": 12}}
    plan = make_plan(parse_recipe(sections, "recipe for tests"), {})
    assert measure._doubling_divisors(12) == [1, 2, 4, 12]
    found = fastest_micro_batches(plan, shards, worker)
    assert len(found) == len(plan.stages)
    assert set(found) <= {1, 2, 4, 12}


def test_a_new_run_measures_once_and_keeps_what_it_found(auto: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    recipe, run_dir = write_recipe(tmp_path / "recipe.yaml", auto), tmp_path / "run"
    asked = []

    def sizes(plan: Plan, folder: Path, num_workers: int) -> Plan:
        asked.append((folder, num_workers))
        assert {stage.micro_batch_size for stage in plan.stages} == {8}, "the whole batch, until it is measured"
        stages = [s.model_copy(update={"micro_batch_size": 2 ** (i % 3)}) for i, s in enumerate(plan.stages)]
        return plan.model_copy(update={"stages": tuple(stages)})

    with pytest.raises(MsltError, match=r"micro_batch_size auto: is measured by `mslt train`.* or write a number"):
        open_recipe(str(recipe), run_dir, shards, 2)
    assert not run_dir.exists()
    first = open_recipe(str(recipe), run_dir, shards, 2, sizes)
    expected = [2 ** (index % 3) for index in range(len(first.plan.stages))]
    for opened in (
        first,
        open_recipe(str(recipe), run_dir, shards, 2, sizes),
        open_recipe(str(recipe), run_dir, shards, 1),
    ):
        assert [stage.micro_batch_size for stage in opened.plan.stages] == expected
    assert [stage.micro_batch_size for stage in read_plan(RunDir(run_dir)).stages] == expected
    assert asked == [(shards, 2)]


@pytest.mark.slow
def test_the_command_measures_before_it_trains(auto: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    auto["schedule"] = {"name": "mslt", "k": 2, "steps": 6, "retrain_share": 0.5}
    auto["optimizer"] = {**auto["optimizer"], "warmup_steps": 1}
    recipe = write_recipe(tmp_path / "recipe.yaml", auto)
    done = mslt("train", recipe, "--run-dir", tmp_path / "run", "--shards", shards, "--workers", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "run" / "plan.json").read_text())["stages"]
    sizes = [stage["micro_batch_size"] for stage in stages]
    assert set(sizes) <= {1, 2, 4}, "divisors of a worker's share"
    assert f"micro-batches of a worker: {', '.join(map(str, sizes))}" in done.stderr
