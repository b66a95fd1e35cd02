"""A run without next-sentence prediction, with whole words masked: growth and freezing as ever, no NSP anywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining

from mslt import metrics
from mslt.cost import stage_cost
from mslt.models import families
from mslt.plan import NEXT_SENTENCE_SLOTS
from mslt.rundir import RunDir, read_plan, read_summaries
from tests.distributed.runs import mslt, train, write_recipe

FAMILY = families.FAMILIES["bert"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_sections: dict[str, Any]) -> RunDir:
    folder = tmp_path_factory.mktemp("mlm-alone")
    data = {**tiny_sections["data"], "next_sentence_prediction": False, "whole_word_masking": True}
    recipe = write_recipe(folder / "recipe.yaml", {**tiny_sections, "data": data})
    train(recipe, shards, folder / "run", workers=2)
    return RunDir(folder / "run")


def test_each_stage_moves_exactly_what_its_plan_trains(finished: RunDir) -> None:
    plan = read_plan(finished)
    for index, stage in enumerate(plan.stages):
        assert not set(NEXT_SENTENCE_SLOTS) & set(stage.trainable)
        base = load_file(finished.stage(index).base)
        end = load_file(finished.stage(index).model / "model.safetensors")
        for name, tensor in base.items():
            moved = not torch.equal(tensor, end[name])
            assert moved == (families.slot_of(FAMILY, name) in stage.trainable), (index + 1, name)


def test_the_model_learns_and_its_folder_is_whole(finished: RunDir) -> None:
    plan, summaries = read_plan(finished), read_summaries(finished)
    losses = [summaries[0]["evaluation_before"]["mlm_loss"], summaries[-1]["evaluation_after"]["mlm_loss"]]
    assert losses[1] < losses[0] - 0.1
    for stage, summary in zip(plan.stages, summaries, strict=True):
        cost = stage_cost(plan.model, stage)
        assert summary["trainable_parameters"] == cost.trainable_parameters
        assert summary["reduced_bytes"] == stage.steps * cost.fp32_gradient_bytes
    _, loading = AutoModelForPreTraining.from_pretrained(finished.stage(2).model, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


def test_nothing_speaks_of_next_sentences(finished: RunDir) -> None:
    for record in [*metrics.read(finished.metrics), *read_summaries(finished)]:
        assert "nsp" not in json.dumps(record)
    shown = mslt("compare", finished.path)
    assert shown.returncode == 0, shown.stderr
    as_json = mslt("compare", finished.path, "--json")
    assert json.loads(as_json.stdout)[0]["nsp_loss"] is None
    again = mslt("train", finished.path.parent / "recipe.yaml", "--run-dir", finished.path, "--shards", "nowhere")
    assert "NSP" not in again.stdout + again.stderr
