"""The story: docs/tutorial.md and what goes on from it, command by command, on English that every Python ships; with a
kill -9."""

import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mslt.evaluate.glue_tasks import TASKS
from mslt.rundir import RunDir, read_plan, read_summaries
from tests.command_lines import fenced
from tests.glue_files import write_glue

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("tutorial", "schedules", "cluster", "report", "files")]


def write_text(folder: Path) -> None:
    folder.mkdir()
    for name, text in pydoc_data.topics.topics.items():
        (folder / f"{name}.txt").write_text(text)


def sst2(folder: Path) -> Path:
    """GLUE's own where it is there, else as many rows of our making."""
    if "MSLT_TEST_DATA" in os.environ and (Path(os.environ["MSLT_TEST_DATA"]) / "glue" / "SST-2").is_dir():
        return Path(os.environ["MSLT_TEST_DATA"]) / "glue"
    num_train, num_dev, _ = TASKS["SST-2"].rows
    return write_glue(folder, num_train, num_dev, ("SST-2",))


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "my-text")
    (tmp_path / "glue").symlink_to(sst2(tmp_path / "made-glue"))
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    for block in (block for page in PAGES for block in fenced(page, "bash")):
        if block.startswith("mslt train"):
            kill_in_the_second_stage(block, tmp_path, environment)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"

    run = RunDir(tmp_path / "run")
    summaries = read_summaries(run)
    assert len(summaries) == len(read_plan(run).stages) == 4
    losses = [summary["evaluation_after"]["mlm_loss"] for summary in summaries]
    assert losses[-1] < summaries[0]["evaluation_before"]["mlm_loss"] - 1.5
    starts = [json.loads(line) for line in run.starts.read_text().splitlines()]
    assert len(starts) > 4, "it was killed once, and went on"
    beside = tmp_path / "run" / "stage-4" / "model-evaluation"
    for path in ("exits/figure-2.png", "states.png", "senteval-cls-logistic/heatmap.csv", "mlm/heatmap.csv"):
        assert (beside / path).is_file(), path
    for path in ("tuned/config.json", "short/config.json"):
        assert (tmp_path / path).is_file(), path
    assert "GLUE, preset quick" in (tmp_path / "report.html").read_text(), "what was evaluated is in the report"
    whole, short = (
        json.loads((folder / "glue-quick" / "results.json").read_text())["tasks"]["SST-2"]["median"]
        for folder in (beside, tmp_path / "short-evaluation")
    )
    assert min(whole, short) > 0.5
    assert json.loads((tmp_path / "short/config.json").read_text())["num_hidden_layers"] == 5


def kill_in_the_second_stage(command: str, folder: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, env=environment, start_new_session=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoint = folder / "run" / "stage-2" / "checkpoints"
    while not list(checkpoint.glob("*/manifest.json")):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
