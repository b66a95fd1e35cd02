"""`mslt train` from end to end, through the real launcher."""

import copy
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForPreTraining, AutoTokenizer

from mslt import metrics
from mslt.cost import run_bytes, stage_cost
from mslt.models import families
from mslt.plan import Plan
from mslt.rundir import KEPT, RunDir, read_plan, read_summaries
from tests.distributed.runs import TIMEOUT_S, losses, mslt, train, write_recipe

FAMILY = families.FAMILIES["bert"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_sections: dict[str, Any]) -> RunDir:
    """A finished run of the tiny recipe on two workers."""
    folder = tmp_path_factory.mktemp("finished")
    sections = {**tiny_sections, "card": {"license": "apache-2.0", "language": "en"}}
    train(write_recipe(folder / "recipe.yaml", sections), shards, folder / "run", workers=2)
    return RunDir(folder / "run")


def weights(run: RunDir, stage_index: int) -> dict[str, torch.Tensor]:
    return load_file(run.stage(stage_index).model / "model.safetensors")


def test_each_stage_moves_exactly_what_its_plan_trains(finished: RunDir) -> None:
    plan = read_plan(finished)
    for index, stage in enumerate(plan.stages):
        base, end = load_file(finished.stage(index).base), weights(finished, index)
        for name, tensor in base.items():
            moved = not torch.equal(tensor, end[name])
            assert moved == (families.slot_of(FAMILY, name) in stage.trainable), (index + 1, name)


def test_every_stage_has_a_card_that_the_hub_reads(finished: RunDir) -> None:
    plan, summaries = read_plan(finished), read_summaries(finished)
    for index, summary in enumerate(summaries):
        card = ModelCard.load(finished.stage(index).model / "README.md")
        assert card.data.to_dict() == {
            "language": "en", "license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "fill-mask",
            "tags": ["bert", "pretraining", "mslt"],
        }  # fmt: skip
        assert f"end of stage {index + 1} of {len(plan.stages)}" in card.text
        assert f"| {summary['evaluation_after']['mlm_loss']:.4f} nats |" in card.text
        rows = [line.split("|")[1:-1] for line in card.text.splitlines() if re.match(r"\| \d+ \|", line)]
        assert [float(row[-1]) for row in rows] == [
            round(each["evaluation_after"]["mlm_loss"], 4) for each in summaries[: index + 1]
        ]
        assert ("intermediate state" in card.text) == (index + 1 < len(plan.stages))
        assert "No licence" not in card.text


def test_growth_copies_and_the_copies_then_differ_from_their_sources(finished: RunDir) -> None:
    before, base, after = weights(finished, 0), load_file(finished.stage(1).base), weights(finished, 1)
    for name in (n for n in base if ".layer.2." in n or ".layer.3." in n):
        source = name.replace(".layer.2.", ".layer.0.").replace(".layer.3.", ".layer.1.")
        assert torch.equal(base[name], before[source])
        assert not torch.equal(after[name], before[source])


def test_a_run_takes_the_room_foretold(finished: RunDir) -> None:
    """But for one more checkpoint, files' headers, and the steps beside the moments."""
    plan = read_plan(finished)
    trained = max(stage_cost(plan.model, stage).trainable_parameters for stage in plan.stages)
    files = list(finished.path.rglob("*.safetensors"))
    taken, foretold = sum(file.stat().st_size for file in files), run_bytes(plan, KEPT) - 12 * trained
    assert foretold <= taken <= foretold + 40_000 * len(files)


def test_stages_hand_over_every_bit(finished: RunDir) -> None:
    plan = read_plan(finished)
    end, base = weights(finished, 1), load_file(finished.stage(2).base)
    assert plan.stages[2].sources == (0, 1, 2, 3)
    assert all(torch.equal(base[name], end[name]) for name in base)


def test_summaries_count_what_the_plan_says(finished: RunDir) -> None:
    plan = read_plan(finished)
    for stage, summary in zip(plan.stages, read_summaries(finished), strict=True):
        cost = stage_cost(plan.model, stage)
        assert summary["trainable_parameters"] == cost.trainable_parameters
        assert summary["reduced_bytes"] == stage.steps * cost.fp32_gradient_bytes
        assert summary["samples"] == stage.steps * stage.batch_size
        spent = summary["spent_s"]
        others = {"start", "log", "evaluation", "checkpoint", "finish"}
        assert {"train", "data", "forward", "backward", "reduce", "optimizer", *others} <= spent.keys()
        assert all(spent[kind] > 0 for kind in others)
        parts = sum(spent[part] for part in ("data", "forward", "backward", "reduce", "optimizer"))
        assert 0.5 * spent["train"] < parts <= spent["train"] * 1.01


def test_every_stage_leaves_a_plain_hugging_face_folder(finished: RunDir) -> None:
    for index, stage in enumerate(read_plan(finished).stages):
        folder = finished.stage(index).model
        model, loading = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        assert model.config.num_hidden_layers == stage.depth
        assert AutoTokenizer.from_pretrained(folder)("a word").input_ids
        assert json.loads((folder / "provenance.json").read_text())["plan"] == read_plan(finished).digest()


def test_metrics_and_tensorboard_hold_every_step_with_its_stage(finished: RunDir) -> None:
    plan = read_plan(finished)
    records = [record for record in metrics.read(finished.metrics) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, plan.steps + 1))
    assert [record["stage"] for record in records] == [1] * 20 + [2] * 20 + [3] * 20
    assert [record["samples"] for record in records] == [8 * step for step in range(1, plan.steps + 1)]
    for index in range(len(plan.stages)):
        board = EventAccumulator(str(finished.tensorboard / f"stage-{index + 1}"))
        board.Reload()
        scalars = board.Scalars("train/mlm_loss")
        expected = [record for record in records if record["stage"] == index + 1]
        assert [scalar.step for scalar in scalars] == [record["step"] for record in expected]
        assert scalars[-1].value == pytest.approx(expected[-1]["mlm_loss"], rel=1e-6)


def test_the_same_command_again_does_nothing(finished: RunDir, shards: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.is_file()}
    again = mslt("train", finished.path.parent / "recipe.yaml", "--shards", shards, "--run-dir", finished.path)
    assert again.returncode == 0
    assert "all 3 stages done" in again.stderr
    assert files == {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.is_file()}


def test_a_run_of_another_plan_is_refused_with_the_difference(
    finished: RunDir, shards: Path, tmp_path: Path, tiny_recipe: dict[str, Any]
) -> None:
    tiny_recipe["schedule"]["steps"] = 63
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe)
    refused = mslt("train", recipe, "--shards", shards, "--run-dir", finished.path)
    assert refused.returncode == 2
    assert "stages.1.steps: 20 → 21" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_compare_shows_the_run_and_draws_it(finished: RunDir, tmp_path: Path) -> None:
    shown = mslt("compare", finished.path, "--json", "--picture", tmp_path / "curves.png")
    assert shown.returncode == 0, shown.stderr
    row = json.loads(shown.stdout)[0]
    assert row["steps"] == 60
    assert row["speedup"] == 1.0
    assert row["reduced_bytes"] == sum(summary["reduced_bytes"] for summary in read_summaries(finished))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("engine", ["zero0_bf16", pytest.param("zero0_fp16", marks=pytest.mark.slow)])
def test_low_precision_learns_and_keeps_fp32_masters_over_the_border(
    tmp_path: Path, shards: Path, tiny_recipe: dict[str, Any], finished: RunDir, engine: str
) -> None:
    tiny_recipe["engine"] = engine
    run = RunDir(tmp_path / "run")
    train(write_recipe(tmp_path / "recipe.yaml", tiny_recipe), shards, run.path, workers=2)
    plan = read_plan(run)
    before, after = (read_summaries(run)[index][f"evaluation_{when}"] for index, when in ((0, "before"), (-1, "after")))
    in_fp32 = read_summaries(finished)[-1]["evaluation_after"]["mlm_loss"]
    assert after["mlm_loss"] < before["mlm_loss"] - 0.1
    assert after["mlm_loss"] == pytest.approx(in_fp32, abs=0.05)
    end, base = weights(run, 0), load_file(run.stage(1).base)
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(base[embeddings], end[embeddings])
    assert not torch.equal(end[embeddings], end[embeddings].bfloat16().float()), "rounded to the compute dtype"
    assert torch.equal(weights(run, 1)[embeddings], base[embeddings]), "frozen, so not a bit may move"
    costs = [stage_cost(plan.model, stage) for stage in plan.stages]
    expected = [cost.half_gradient_bytes * stage.steps for cost, stage in zip(costs, plan.stages, strict=True)]
    assert [summary["reduced_bytes"] for summary in read_summaries(run)] == expected


@pytest.mark.slow
def test_frozen_layers_in_int8_leave_exact_models(tmp_path: Path, shards: Path, tiny_recipe: dict[str, Any]) -> None:
    """Compiled where there is a compiler, and eager where there is none: a recipe asks for both together."""
    tiny_recipe["engine"] = "zero0_bf16"
    tiny_recipe["schedule"] |= {"frozen_precision": "int8"}
    tiny_recipe["training"] |= {"compile": "frozen"}
    run = RunDir(tmp_path / "run")
    train(write_recipe(tmp_path / "recipe.yaml", tiny_recipe), shards, run.path, workers=2)
    plan = read_plan(run)
    for index, stage in enumerate(plan.stages):
        base, end = load_file(run.stage(index).base), weights(run, index)
        assert end.keys() == base.keys()
        frozen = {name for name in base if families.slot_of(families.FAMILIES["bert"], name) in stage.frozen}
        assert all(torch.equal(end[name], base[name]) for name in frozen)
        assert any(not torch.equal(end[name], base[name]) for name in base.keys() - frozen)
    before, after = (read_summaries(run)[index][f"evaluation_{when}"] for index, when in ((0, "before"), (-1, "after")))
    assert after["mlm_loss"] < before["mlm_loss"] - 0.1


def test_told_to_leave_it_saves_and_leaves_no_process_behind_and_goes_on_with_other_workers(
    tmp_path: Path, shards: Path, tiny_recipe: dict[str, Any]
) -> None:
    sections = copy.deepcopy(tiny_recipe)
    sections["watch"]["checkpoint_every"] = 1000  # only what the signal makes it save
    sections["engine"] = "zero1_fp32"
    sections["schedule"]["steps"] = 150
    recipe, run = write_recipe(tmp_path / "recipe.yaml", sections), RunDir(tmp_path / "run")
    command = ["train", recipe, "--shards", shards, "--run-dir", run.path, "--workers", "2"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "mslt.cli.main", *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not any(record["stage"] == 2 and record["step"] > 52 for record in metrics.read(run.metrics)):
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    descendants = psutil.Process(parent.pid).children(recursive=True)
    assert len(descendants) >= 2
    parent.send_signal(signal.SIGTERM)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == 75
    assert "saved and left, as it was told" in said
    _, alive = psutil.wait_procs(descendants, timeout=5)
    assert not alive
    left_at = max(record["step"] for record in metrics.read(run.metrics)) - 50
    assert left_at < 50, "told too late: the stage was over"
    newest = max(path.name for path in run.stage(1).checkpoints.glob("step-*"))
    assert newest == f"step-{left_at:08d}"
    train(recipe, shards, run.path, workers=1)
    assert list(losses(run.path)) == list(range(1, 151))


def test_plan_in_the_run_directory_is_the_plan_of_the_recipe(finished: RunDir, tiny_plan: Plan) -> None:
    stored = read_plan(finished)
    assert stored.shards_sha256 is not None
    assert stored.model_copy(update={"shards_sha256": None, "card": tiny_plan.card}) == tiny_plan
