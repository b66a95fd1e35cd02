"""`mslt doctor` on two hosts: a healthy pair, and eight broken ones, each found and named."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.hosts import Made, hosts, netns
from tests.distributed.runs import TIMEOUT_S, write_recipe

SECOND = "10.77.0.2"
WAIT_S = 40  # for a process to start, on a busy machine


@dataclass
class Pair:
    """What is done to the second host, and what the first one is to find."""

    tmp: Path
    shards: Path
    recipe: Path
    run: Path
    made: Made
    stack: ExitStack
    options: dict[int, list[str]] = field(default_factory=lambda: {0: [], 1: []})
    before: dict[int, str] = field(default_factory=lambda: {0: "", 1: ""})
    starts: tuple[int, ...] = (0, 1)

    def change_shards(self, change: Callable[[Path], None]) -> None:
        """Let the second host see a changed copy of the shards in their place."""
        copy = self.tmp / "other-shards"
        shutil.copytree(self.shards, copy)
        change(copy)
        self.before[1] = f"mount --bind {copy} {self.shards}"


def other_version(pair: Pair) -> None:
    other = pair.tmp / "other" / "deepspeed-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1\n")
    pair.before[1] = f'export PYTHONPATH="{other.parent}:$PYTHONPATH"'


def missing_shard(pair: Pair) -> None:
    pair.change_shards(lambda copy: sorted(copy.glob("train-*"))[0].unlink())


def different_data(pair: Pair) -> None:
    def change(copy: Path) -> None:
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["rules"]["min_document_tokens"] += 1
        (copy / "manifest.json").write_text(json.dumps(manifest))

    pair.change_shards(change)


def read_only_folder(pair: Pair) -> None:
    pair.before[1] = f"mount --bind {pair.run} {pair.run}\nmount -o remount,bind,ro {pair.run}"


def full_disk(pair: Pair) -> None:
    pair.stack.enter_context(mounted(pair.run, "1m"))


def dead_host(pair: Pair) -> None:
    pair.starts = (0,)
    pair.options[0] += ["--wait-s", "5"]


def slow_link(pair: Pair) -> None:
    pair.made.slow(1, "100mbit")


def no_gpu(pair: Pair) -> None:
    pair.options[1] += ["--expect-gpus", "1"]


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """A small disk, for all hosts."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


FAULTS: dict[Any, tuple[str, str, str, str]] = {
    other_version: (SECOND, "versions", "fail", "deepspeed 0.1 ("),
    missing_shard: (SECOND, "shards", "fail", "train-00000.arrow: missing"),
    read_only_folder: (SECOND, "folder", "fail", "cannot be written (Read-only file system)"),
    full_disk: ("10.77.0.1", "disk", "fail", "the run's checkpoints and models take"),
    dead_host: (SECOND, "host", "fail", "did not come within 5 s"),
    slow_link: (SECOND, "link", "warn", "Gbit/s to the first host, under 0.5"),
    different_data: (SECOND, "shards", "fail", "the manifest's hash is"),
    no_gpu: (SECOND, "gpus", "fail", "torch sees 0 GPUs, 1 expected"),
}


@pytest.fixture
def pair(tmp_path: Path, shards: Path, tiny_recipe: dict[str, Any]) -> Iterator[Pair]:
    with ExitStack() as stack:
        made = stack.enter_context(hosts(2))
        run = tmp_path / "run"
        run.mkdir()
        yield Pair(tmp_path, shards, write_recipe(tmp_path / "recipe.yaml", tiny_recipe), run, made, stack)


def examined(pair: Pair) -> tuple[dict[str, Any], dict[int, int]]:
    """What the first host found, and with which status each of them ended."""
    hostfile = pair.made.hostfile(pair.tmp / "hostfile")
    command = [sys.executable, "-m", "mslt.cli.main", "doctor", pair.recipe, "--shards", pair.shards]
    command += ["--run-dir", pair.run, "--hostfile", hostfile, "--wait-s", str(WAIT_S), "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = {
        host: pair.made.start(
            host, [*command, "--node-rank", str(host), *pair.options[host]], pair.before[host], **pipes
        )
        for host in pair.starts
    }
    told = {host: process.communicate(timeout=TIMEOUT_S) for host, process in processes.items()}
    assert told[0][0], told
    if 1 in told:
        assert told[1][0] == "", told
    return json.loads(told[0][0]), {host: process.returncode for host, process in processes.items()}


@netns
def test_a_healthy_pair(pair: Pair) -> None:
    described, statuses = examined(pair)
    found = {(each["host"], each["check"]) for each in described["findings"]}
    assert [each for each in described["findings"] if each["status"] != "ok"] == []
    assert statuses == {0: 0, 1: 0}
    checks = {"versions", "recipe", "gpus", "shards", "folder", "disk"}
    assert found == {
        *(("10.77.0.1", check) for check in checks),
        *((SECOND, check) for check in {*checks, "clock", "link"}),
        ("all", "gradients"),
    }
    assert list(pair.run.iterdir()) == []


@netns
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_broken_pair(pair: Pair, fault: Callable[[Pair], None]) -> None:
    fault(pair)
    described, statuses = examined(pair)
    host, check, status, said = FAULTS[fault]
    bad = [each for each in described["findings"] if each["status"] != "ok"]
    (finding,) = [each for each in bad if each["host"] == host]
    assert (finding["check"], finding["status"]) == (check, status)
    assert said in finding["said"]
    assert finding["remedy"]
    if fault is not full_disk:  # which is every host's
        assert bad == [finding]
    assert set(statuses.values()) == {int(status == "fail")}
    assert described["would_fail"] == (status == "fail")
    assert list(pair.run.iterdir()) == []
