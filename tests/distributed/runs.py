"""Real runs for tests: the command line in a subprocess, killed where a test says so."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from mslt import metrics

TIMEOUT_S = 240


def write_recipe(path: Path, sections: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(sections))
    return path


def mslt(*arguments: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    command = [sys.executable, "-m", "mslt.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, **kwargs)


def train(recipe: Path, shards: Path, run: Path, workers: int) -> None:
    """`mslt train` to the end; fails with what it printed."""
    done = mslt("train", recipe, "--shards", shards, "--run-dir", run, "--workers", str(workers))
    assert done.returncode == 0, done.stdout + done.stderr


def train_and_kill(recipe: Path, shards: Path, run: Path, workers: int, at_step: int) -> None:
    """`mslt train`, every process of it ended by SIGKILL once step `at_step` of the run is logged."""
    command = ["train", recipe, "--shards", shards, "--run-dir", run, "--workers", workers]
    parent = subprocess.Popen(
        [sys.executable, "-m", "mslt.cli.main", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not any(record["step"] >= at_step for record in metrics.read(run / "metrics.jsonl")):
        assert parent.poll() is None, f"ended before step {at_step}: {parent.stderr and parent.stderr.read()}"
        assert time.monotonic() < deadline, f"no step {at_step} within {TIMEOUT_S} s"
        time.sleep(0.02)
    # The launcher runs in a session of its own, but stays a descendant.
    for process in [*psutil.Process(parent.pid).children(recursive=True), psutil.Process(parent.pid)]:
        os.kill(process.pid, signal.SIGKILL)
    parent.wait()


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """(MLM, NSP) training loss at each step of the run."""
    records = (record for record in metrics.read(run / "metrics.jsonl") if record["kind"] == "train")
    return {record["step"]: (record["mlm_loss"], record["nsp_loss"]) for record in records}
