"""M7: SIGKILL at a random step of every stage, and the run goes on as if nothing had been."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mslt.rundir import RunDir, read_plan
from tests.distributed.runs import losses, train, train_and_kill, write_recipe

SEED = 20


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_run_has_the_losses_and_weights_of_an_undisturbed_one(
    tmp_path: Path, shards: Path, tiny_recipe: dict[str, Any], workers: int
) -> None:
    sections = copy.deepcopy(tiny_recipe)
    sections["schedule"]["steps"] = 120  # three stages of 40: room for 20 losses after any kill
    assert sections["watch"]["log_every"] == 1
    assert sections["model"].get("hidden_dropout_prob", 0.1) > 0
    recipe = write_recipe(tmp_path / "recipe.yaml", sections)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train(recipe, shards, undisturbed, workers)
    plan = read_plan(RunDir(undisturbed))

    rng = random.Random(SEED + workers)
    kills = [plan.first_step(index) + rng.randrange(2, 20) for index in range(len(plan.stages))]
    print(f"seed {SEED + workers}: kills at steps {kills}")
    frozen_before: dict[str, torch.Tensor] = {}
    for step in kills:
        train_and_kill(recipe, shards, killed, workers, step)
    train(recipe, shards, killed, workers)

    expected, found = losses(undisturbed), losses(killed)
    assert list(found) == list(expected) == list(range(1, 121))
    for step in kills:
        assert [found[s] for s in range(step, step + 21)] == [expected[s] for s in range(step, step + 21)], step
    assert found == expected
    for index, stage in enumerate(plan.stages):
        one = load_file(RunDir(undisturbed).stage(index).model / "model.safetensors")
        other = load_file(RunDir(killed).stage(index).model / "model.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), index
        if "embeddings" in stage.frozen:
            name = "bert.embeddings.word_embeddings.weight"
            assert torch.equal(other[name], frozen_before[name]), "frozen weights moved"
        frozen_before = other
