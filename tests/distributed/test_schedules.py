"""Every schedule through the real loop: layers come from where the plan says, and exactly what it says is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mslt.config import parse_recipe
from mslt.data.manifest import read_manifest
from mslt.engine.ds_config import read_engine_config
from mslt.models import factory
from mslt.models.families import FAMILIES, slot_of
from mslt.models.surgery import State
from mslt.rundir import open_run, read_summaries
from mslt.schedule import make_plan
from mslt.train import train
from tests.distributed.probe import alone

LISTED = [
    {"sources": "random,random", "share": 1},
    {"sources": "0,random,1", "share": 1, "freeze": "embeddings"},
    {"sources": "0-2,1", "share": 2, "freeze": "below"},
    {"sources": "3-3,0-2", "share": 1},
]
SCHEDULES: dict[str, dict[str, Any]] = {
    "stacking, moments carried": {"name": "stacking", "shares": [1, 2], "optimizer_state": "carry"},
    "interleave, frozen below": {"name": "interleave", "shares": [1, 1, 2], "freeze": "below"},
    "one shot of random layers": {"name": "one_shot", "new_layers": "random", "rewarmup_steps": 2},
    "random tops, moments carried": {"name": "mslt", "k": 2, "new_layers": "random", "optimizer_state": "carry"},
    "a list": {"name": "stages", "stages": LISTED, "optimizer_state": "carry"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_trains_what_it_says(name: str, tiny_recipe: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    tiny_recipe["schedule"] = {"steps": 14, **SCHEDULES[name]}
    recipe = parse_recipe(tiny_recipe, "recipe")
    plan = make_plan(recipe, read_engine_config(recipe.engine), read_manifest(shards).hash)
    run = open_run(tmp_path / "run", plan, "", {})
    with alone() as workers:
        train(plan, run, shards, recipe.watch, workers, lambda: False)

    assert [summary["steps"] for summary in read_summaries(run)] == [stage.steps for stage in plan.stages]
    family = FAMILIES["bert"]
    before: State = {}
    for index, stage in enumerate(plan.stages):
        where = run.stage(index)
        base, after = load_file(where.base), factory.own_state(factory.read_model(where.model))
        assert base.keys() == after.keys()
        for key in base:
            match = family.layer_key.match(key)
            source = int(match["layer"]) if match else None
            origin = None if source is None else stage.sources[source]
            if index and origin != "random":
                old = key if match is None else f"{match['before']}{origin}{match['after']}"
                assert torch.equal(base[key], before[old]), f"stage {index + 1}: {key} is not the {old} of before"
            trained = slot_of(family, key) in stage.trainable
            assert torch.equal(base[key], after[key]) != trained, (
                f"stage {index + 1}: {key}, planned to train: {trained}"
            )
        before = after


def test_full_training_cut_into_stages_is_full_training(
    tiny_recipe: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    """So a baseline may leave snapshots where another schedule does."""
    depth = tiny_recipe["model"]["num_hidden_layers"]
    same = f"0-{depth - 1}"
    cut = [
        {"sources": ",".join(["random"] * depth), "share": 1},
        {"sources": same, "share": 1},
        {"sources": same, "share": 2},
    ]
    ended: list[State] = []
    for name, schedule in (("whole", {"name": "full"}),
                           ("cut", {"name": "stages", "stages": cut, "optimizer_state": "carry"})):  # fmt: skip
        tiny_recipe["schedule"] = {"steps": 8, **schedule}
        recipe = parse_recipe(tiny_recipe, "recipe")
        plan = make_plan(recipe, read_engine_config(recipe.engine), read_manifest(shards).hash)
        run = open_run(tmp_path / name, plan, "", {})
        with alone() as workers:
            train(plan, run, shards, recipe.watch, workers, lambda: False)
        ended.append(factory.own_state(factory.read_model(run.stage(len(plan.stages) - 1).model)))
    whole, cut_up = ended
    assert whole.keys() == cut_up.keys()
    assert all(torch.equal(whole[key], cut_up[key]) for key in whole)
