"""A grid of fine-tunings shared by hosts: network namespaces on one machine, which see the same disk."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.hosts import Made, hosts, netns
from tests.distributed.runs import TIMEOUT_S
from tests.encoders import write_encoder
from tests.glue_files import write_glue

COMMAND = (sys.executable, "-m", "mslt.cli.main", "evaluate", "glue")
OPTIONS = ("--preset", "quick", "--task", "SST-2", "--task", "CoLA", "--seeds", "4", "--max-tokens", "16", "--subset")


@pytest.mark.slow
@netns
def test_two_hosts_share_a_grid_and_one_ends_it_when_the_other_dies(tmp_path: Path) -> None:
    encoder, data = write_encoder(tmp_path / "encoder"), write_glue(tmp_path / "glue")
    line = [*COMMAND, encoder, "--data-dir", data, *OPTIONS]
    alone, shared, survived = (tmp_path / name for name in ("alone", "shared", "survived"))
    subprocess.run([*line, "--out", alone], check=True, capture_output=True, timeout=TIMEOUT_S)

    with hosts(2) as made:
        parts = _start(made, [*line, "--out", shared], tmp_path)
        said = [part.communicate(timeout=TIMEOUT_S)[1] for part in parts]
        assert [part.returncode for part in parts] == [0, 0], said
        assert "of 8" in said[0]
        assert "of 8" in said[1], "the second host did nothing"

        parts = _start(made, [*line, "--out", survived], tmp_path)
        deadline = time.monotonic() + TIMEOUT_S
        while not list(survived.glob("cells/*/*.json")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        made.end(1)
        said = [part.communicate(timeout=TIMEOUT_S)[1] for part in parts]
        assert parts[0].returncode == 0, said[0]
        assert not made.processes(0)
    results = (alone / "results.json").read_bytes()
    assert (shared / "results.json").read_bytes() == results
    assert (survived / "results.json").read_bytes() == results


def _start(made: Made, line: list[str | Path], folder: Path) -> list[subprocess.Popen[str]]:
    hostfile = made.hostfile(folder / "hosts")
    return [
        made.start(host, [*line, "--hostfile", hostfile, "--node-rank", str(host)], stderr=subprocess.PIPE)
        for host in range(2)
    ]
