"""The README's first command, from the user's side."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.runs import mslt

ROOT = Path(__file__).parents[2]


def quickstart(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / "quickstart.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_quickstart_grows_faster_than_the_baseline_and_does_nothing_twice(tmp_path: Path) -> None:
    first = quickstart("--out", tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"{tmp_path}/mslt/stage-4/model" in first.stdout
    assert (tmp_path / "curves.png").exists()
    full, grown = json.loads(mslt("compare", tmp_path / "full", tmp_path / "mslt", "--json").stdout)
    assert full["steps"] == grown["steps"]
    assert grown["speedup"] >= 1.3
    assert grown["reduced_bytes"] < full["reduced_bytes"]

    started = time.monotonic()
    again = quickstart("--out", tmp_path)
    assert again.returncode == 0
    assert "already made from this recipe" in again.stdout
    assert "samples/s" not in again.stderr
    assert time.monotonic() - started < 60


def test_quickstart_says_what_it_takes(tmp_path: Path) -> None:
    refused = quickstart("--txt", tmp_path)
    assert refused.returncode == 2
    assert "--text DIR" in refused.stderr
