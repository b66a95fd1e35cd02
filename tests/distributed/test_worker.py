"""The bare worker, for those who bring their own launcher, with everything on that the other runs leave off."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from mslt import metrics
from mslt.data.manifest import read_manifest
from mslt.plan import Plan
from mslt.rundir import RunDir, lock_run, open_run, read_plan
from tests.distributed.runs import TIMEOUT_S, losses, mslt, train_and_kill, write_recipe

ROOT = Path(__file__).parents[2]


def launch_worker(recipe: Path, shards: Path, run: Path) -> subprocess.CompletedProcess[str]:
    """`deepspeed launch/pretrain.py RECIPE`, with the launcher's own `--local_rank`."""
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", "29655"),
        *(str(ROOT / "launch" / "pretrain.py"), str(recipe), "--run-dir", str(run), "--shards", str(shards)),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_pretrain_script_runs_the_whole_plan_and_resumes_without_frozen_dropout(
    tmp_path: Path, shards: Path, tiny_recipe: dict[str, Any]
) -> None:
    """Loader workers, log windows of several steps, evaluations inside stages, frozen layers still: the same losses
    whether the run was killed in the second stage or not."""
    tiny_recipe["schedule"]["frozen_dropout"] = False
    tiny_recipe["watch"] = {"log_every": 2, "evaluate_every": 8, "checkpoint_every": 4, "loader_workers": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe)
    undisturbed, killed = RunDir(tmp_path / "undisturbed"), RunDir(tmp_path / "killed")
    done = launch_worker(recipe, shards, undisturbed.path)
    assert undisturbed.first_unfinished(read_plan(undisturbed)) is None, done.stdout + done.stderr
    records = list(metrics.read(undisturbed.metrics))
    evaluated = [record["step"] for record in records if record["kind"] == "evaluation" and record["stage"] == 2]
    assert evaluated == [20, 28, 36, 40]
    assert list(losses(undisturbed.path)) == list(range(2, 61, 2))

    train_and_kill(recipe, shards, killed.path, workers=1, at_step=30)
    assert launch_worker(recipe, shards, killed.path).returncode == 0
    assert losses(killed.path) == losses(undisturbed.path)


def test_a_run_directory_in_use_is_refused(
    tmp_path: Path, shards: Path, tiny_recipe: dict[str, Any], tiny_plan: Plan
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe)
    plan = tiny_plan.model_copy(update={"shards_sha256": read_manifest(shards).hash})
    held = open_run(tmp_path / "run", plan, recipe.read_text(), {})
    with lock_run(held):
        refused = mslt("train", recipe, "--shards", shards, "--run-dir", held.path)
    assert refused.returncode == 2
    assert "another process is training in this run directory" in refused.stderr
    assert not held.stage(0).path.exists()
    with lock_run(held):
        pass
