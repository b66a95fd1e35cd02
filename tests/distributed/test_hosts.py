"""Runs on several hosts: the bits of one, after faults, too. Hosts are network namespaces; all see the same disk."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mslt import metrics
from mslt.rundir import RunDir, read_summaries
from tests.distributed.hosts import Made, hosts, netns
from tests.distributed.runs import TIMEOUT_S, losses, mslt, train, write_recipe

LEFT = 75


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Of each worker, on one host and on several: sums in the same order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_sections: dict[str, Any]) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", tiny_sections)


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory, shards: Path, recipe: Path) -> RunDir:
    """Two workers on one host."""
    run = tmp_path_factory.mktemp("on_one") / "run"
    train(recipe, shards, run, workers=2)
    return RunDir(run)


def command(recipe: Path, shards: Path, run: RunDir, hostfile: Path, *options: str) -> list[str | Path]:
    train = [sys.executable, "-m", "mslt.cli.main", "train", recipe, "--shards", shards, "--run-dir", run.path]
    return [*train, "--hostfile", hostfile, *options]


class Parts:
    """`mslt train --node-rank` on every host, and what each says."""

    def __init__(self, made: Made, recipe: Path, shards: Path, run: RunDir, folder: Path, *options: str) -> None:
        self.run, self.made = run, made
        self.said = [folder / f"{run.path.name}-host-{host}.log" for host in range(len(made.namespaces))]
        hostfile = made.hostfile(folder / "hosts")
        self.processes = []
        for host, path in enumerate(self.said):
            line = command(recipe, shards, run, hostfile, "--node-rank", str(host), *options)
            with path.open("w") as file:
                self.processes.append(made.start(host, line, stdout=file, stderr=file))

    def wait(self, *hosts: int) -> list[int]:
        """Exit statuses of the hosts', by default of all."""
        return [self.processes[host].wait(TIMEOUT_S) for host in hosts or range(len(self.processes))]

    def wait_for_step(self, step: int) -> None:
        wait_for_step(self.run, step, self.processes[0])

    def text(self) -> str:
        return "\n".join(path.read_text() for path in self.said)

    def ranks(self, host: int) -> list[psutil.Process]:
        found = [psutil.Process(number) for number in self.made.processes(host)]
        return [process for process in found if "mslt.cli.worker" in process.cmdline()[:4]]


def wait_for_step(run: RunDir, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not any(record["step"] >= step for record in metrics.read(run.metrics)):
        assert process.poll() is None, f"ended before step {step}"
        assert time.monotonic() < deadline, f"no step {step} within {TIMEOUT_S} s"
        time.sleep(0.01)


def assert_same(expected: RunDir, found: RunDir) -> None:
    assert losses(expected.path) == losses(found.path)
    for stage in range(3):
        file = Path("model") / "model.safetensors"
        one, other = (load_file(run.stage(stage).path / file) for run in (expected, found))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@netns
def test_two_hosts_have_the_bits_of_one(on_one: RunDir, recipe: Path, shards: Path, tmp_path: Path) -> None:
    with hosts(2) as made:
        parts = Parts(made, recipe, shards, RunDir(tmp_path / "run"), tmp_path)
        assert parts.wait() == [0, 0], parts.text()
        assert not [process for host in range(2) for process in made.processes(host)]
    assert_same(on_one, parts.run)
    assert "all 3 stages done" in parts.said[0].read_text()
    assert parts.said[1].read_text() == "", "one log that can be read is enough"
    assert {path.name for path in parts.run.logs.iterdir()} == {"rank-00000.log", "rank-00001.log"}
    assert "step 60/" not in (parts.run.logs / "rank-00001.log").read_text()
    assert "held-out MLM" in (parts.run.logs / "rank-00000.log").read_text()


@pytest.mark.slow
@netns
def test_four_hosts_have_the_bits_of_one(recipe: Path, shards: Path, tmp_path: Path) -> None:
    train(recipe, shards, tmp_path / "on-one", workers=4)
    with hosts(4) as made:
        parts = Parts(made, recipe, shards, RunDir(tmp_path / "run"), tmp_path)
        assert parts.wait() == [0] * 4, parts.text()
    assert_same(RunDir(tmp_path / "on-one"), parts.run)


@contextmanager
def sshd_on_each(made: Made, folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which pdsh finds its way."""
    for name in ("mine", "theirs"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "HostKey": folder / "theirs",
        "AuthorizedKeysFile": folder / "mine.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "PidFile": "none",
    }
    listed = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    daemons = [
        made.start(host, ["/usr/sbin/sshd", "-D", *listed], stderr=subprocess.DEVNULL)
        for host in range(len(made.namespaces))
    ]
    ssh = f"-i {folder / 'mine'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    yield {**os.environ, "PDSH_SSH_ARGS_APPEND": ssh}
    for daemon in daemons:
        daemon.kill()


@pytest.mark.slow
@netns
@pytest.mark.skipif(
    not Path("/usr/sbin/sshd").exists() or not Path("/usr/bin/pdsh").exists(), reason="needs pdsh and sshd"
)
def test_one_command_starts_all_hosts_saves_on_both_and_goes_on(
    on_one: RunDir, recipe: Path, shards: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    with hosts(2) as made, sshd_on_each(made, tmp_path) as environment:
        line = command(recipe, shards, run, made.hostfile(tmp_path / "hosts"))
        first = made.start(0, line, stderr=subprocess.PIPE, env=environment)
        wait_for_step(run, 10, first)
        first.send_signal(signal.SIGINT)
        said = first.communicate(timeout=TIMEOUT_S)[1]
        assert first.returncode == LEFT, said
        assert "asked the run to save and leave" in said
        again = made.start(0, line, stderr=subprocess.PIPE, env=environment)
        said = again.communicate(timeout=TIMEOUT_S)[1]
        assert again.returncode == 0, said
        assert "stage 1/3 (2 layers)  step 9/" not in said, "it goes on where it was"
    assert_same(on_one, run)


@pytest.mark.slow
@netns
@pytest.mark.skipif(
    not Path("/usr/sbin/sshd").exists() or not Path("/usr/bin/pdsh").exists(), reason="needs pdsh and sshd"
)
def test_told_twice_nothing_is_left_on_any_host(recipe: Path, shards: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with hosts(2) as made, sshd_on_each(made, tmp_path) as environment:
        started = made.start(0, command(recipe, shards, run, made.hostfile(tmp_path / "hosts")), env=environment)
        wait_for_step(run, 2, started)
        for _ in range(2):
            started.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert started.wait(TIMEOUT_S) != 0
        deadline = time.monotonic() + 60
        while any("mslt" in " ".join(psutil.Process(n).cmdline()) for host in range(2) for n in made.processes(host)):
            assert time.monotonic() < deadline
            time.sleep(0.5)


@pytest.mark.slow
@netns
def test_a_killed_rank_and_a_cut_wire_cost_a_start_each(
    on_one: RunDir, recipe: Path, shards: Path, tmp_path: Path
) -> None:
    with hosts(2) as made:
        options = ("--restarts", "9", "--timeout-minutes", "0.3")
        parts = Parts(made, recipe, shards, RunDir(tmp_path / "run"), tmp_path, *options)
        parts.wait_for_step(10)
        parts.ranks(1)[0].kill()
        parts.wait_for_step(25)
        made.cut(1)
        time.sleep(25)
        made.mend(1)
        assert parts.wait() == [0, 0], parts.text()
        assert not [process for host in range(2) for process in made.processes(host)]
    assert_same(on_one, parts.run)
    said = parts.said[0].read_text()
    assert "starting again in" in said
    assert "nothing has moved for 18 s" in said
    assert "resuming stage" in said


@pytest.mark.slow
@netns
def test_a_supervisor_that_is_killed_leaves_nothing_on_its_host(recipe: Path, shards: Path, tmp_path: Path) -> None:
    with hosts(2) as made:
        parts = Parts(made, recipe, shards, RunDir(tmp_path / "run"), tmp_path, "--timeout-minutes", "0.3")
        parts.wait_for_step(5)
        parts.processes[1].kill()
        assert parts.wait() == [2, -signal.SIGKILL]
        assert not made.processes(1)
        assert "stopped in stage" in parts.said[0].read_text()


@pytest.mark.slow
@netns
def test_a_run_goes_on_without_a_host_that_does_not_come_back(
    shards: Path, tmp_path: Path, tiny_recipe: dict[str, Any]
) -> None:
    tiny_recipe["model"] |= {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # every worker draws its own
    recipe = write_recipe(tmp_path / "still.yaml", tiny_recipe)
    train(recipe, shards, tmp_path / "on-one", workers=2)
    with hosts(2) as made:
        options = ("--restarts", "9", "--timeout-minutes", "0.3", "--min-nodes", "1")
        parts = Parts(made, recipe, shards, RunDir(tmp_path / "run"), tmp_path, *options)
        parts.wait_for_step(10)
        made.end(1)
        assert parts.wait(0) == [0], parts.text()
    expected, found = losses(tmp_path / "on-one"), losses(parts.run.path)
    assert expected.keys() == found.keys()
    assert [summary["world_size"] for summary in read_summaries(parts.run)][1:] == [1, 1]
    for step, (mlm, nsp) in expected.items():
        assert found[step] == pytest.approx((mlm, nsp), abs=2e-5), f"step {step}"


def test_more_hosts_than_a_batch_can_be_dealt_out_to_are_refused(recipe: Path, shards: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=1\nb slots=1\nc slots=1\n")
    run = tmp_path / "run"
    done = mslt("train", recipe, "--shards", shards, "--run-dir", run, "--hostfile", hostfile, "--node-rank", "0")
    assert done.returncode == 2
    assert "training.batch_size 8 is not a multiple of the 3 workers" in done.stderr
    assert not run.exists()
