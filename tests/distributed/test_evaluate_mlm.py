"""`mslt evaluate mlm` of a run's models: the numbers that the run logged, in its precision."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mslt import metrics
from mslt.errors import MsltError
from mslt.evaluate.mlm import evaluate_mlm
from mslt.rundir import RunDir, find_model, read_summaries
from tests.distributed.runs import mslt, train, write_recipe

ROUNDING = 1e-5  # of sums of bf16 products, whose order follows how tensors lie in memory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_sections: dict[str, Any]) -> RunDir:
    """Two stages of 3 steps, in bf16, on one worker."""
    folder = tmp_path_factory.mktemp("evaluated")
    schedule = {"name": "one_shot", "start_depth": 2, "shallow_share": 0.5, "steps": 6}
    changed = {"schedule": schedule, "engine": "zero0_bf16", "optimizer": {"learning_rate": 0.01, "warmup_steps": 1}}
    recipe = write_recipe(folder / "recipe.yaml", {**tiny_sections, **changed})
    train(recipe, shards, folder / "run", workers=1)
    return RunDir(folder / "run")


def evaluate(checkpoint: Path, shards: Path, **changes: Any) -> dict[str, Any]:
    return evaluate_mlm(str(checkpoint), shards, torch.device("cpu"), lambda done, total: None, **changes)


def test_the_numbers_are_those_that_were_logged(finished: RunDir, shards: Path) -> None:
    for index, summary in enumerate(read_summaries(finished)):
        found = evaluate(finished.stage(index).model, shards)
        logged = summary["evaluation_after"]
        assert logged == pytest.approx({name: found[name] for name in logged}, rel=ROUNDING)
        assert found["logged"] == logged
        assert (found["precision"], found["sequence_length"], found["samples"]) == ("bf16", 32, 32)
        assert found["remarks"] == []
    last = [record for record in metrics.read(finished.metrics) if record["kind"] == "evaluation"][-1]
    assert found["mlm_loss"] == pytest.approx(last["mlm_loss"], rel=ROUNDING)


def test_a_run_and_a_stage_name_their_model(finished: RunDir, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, first = finished.stage(1), finished.stage(0)
    assert find_model(finished.path) == (last.model, (finished, 1))
    assert find_model(first.path) == (first.model, (finished, 0))
    assert find_model(first.model) == (first.model, (finished, 0))
    monkeypatch.chdir(first.path)
    assert find_model(Path()) == (Path("model"), (RunDir(finished.path.resolve()), 0))
    done = mslt("evaluate", "mlm", finished.path, "--shards", shards, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["checkpoint"] == str(last.model)
    assert found["mlm_loss"] == pytest.approx(found["logged"]["mlm_loss"], rel=1e-6)


def test_other_settings_are_not_held_against_what_was_logged(finished: RunDir, shards: Path) -> None:
    exact = evaluate(finished.path, shards, precision="fp32")
    rounded = evaluate(finished.path, shards)
    assert exact["remarks"] == ["other settings than the run's"]
    assert exact["logged"] is None
    assert exact["mlm_loss"] != rounded["mlm_loss"]
    assert exact["mlm_loss"] == pytest.approx(rounded["mlm_loss"], rel=0.01)


def test_other_shards_are_not_held_against_what_was_logged(finished: RunDir, shards: Path, tmp_path: Path) -> None:
    other = shutil.copytree(shards, tmp_path / "shards")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["rules"]["validation_share"] = 0.2
    (other / "manifest.json").write_text(json.dumps(manifest))
    found = evaluate(finished.path, other)
    assert (found["logged"], found["remarks"]) == (None, ["other shards than the run's"])


def test_what_a_run_computed_in_int8_is_said_to_be_exact(finished: RunDir, shards: Path, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(finished.path, tmp_path / "run"))
    plan = json.loads(run.plan.read_text())
    stage = plan["stages"][1]
    stage |= {"frozen_precision": "int8", "trainable": [slot for slot in stage["trainable"] if slot != "embeddings"]}
    run.plan.write_text(json.dumps(plan))
    found = evaluate(run.path, shards)
    assert found["logged"] is not None
    assert found["remarks"] == ["the run computed this stage's frozen layers in int8; here they are exact"]


def test_a_stage_that_is_not_finished_has_no_model(finished: RunDir, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(finished.path, tmp_path / "run"))
    run.stage(1).summary.unlink()
    assert find_model(run.path) == (run.stage(0).model, (run, 0))
    with pytest.raises(MsltError, match="this stage is not finished; name one that has"):
        find_model(run.stage(1).path)
    run.stage(0).summary.unlink()
    with pytest.raises(MsltError, match="no stage of this run is finished"):
        find_model(run.path)


def test_a_model_folder_outside_of_a_run_stands_for_itself(finished: RunDir, tmp_path: Path) -> None:
    copied = shutil.copytree(finished.stage(0).model, tmp_path / "stage-1" / "model")
    assert find_model(copied) == (copied, None)
    assert find_model(tmp_path / "none") == (tmp_path / "none", None)
