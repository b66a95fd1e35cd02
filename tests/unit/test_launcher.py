"""Told to leave, `launch` lets the ranks save: here DeepSpeed's processes are stood in for by a launcher and a rank.
Runs that train apart are told, too, and have GPUs of their own; of a timing that was told nothing is taken."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mslt import launcher
from mslt.data.loader import Samples, training_batches
from mslt.data.shards import open_shards
from mslt.errors import MsltError
from mslt.nodes import Place
from mslt.plan import Plan

SAVING_S = 2.5  # over twice GRACE_S: an end that does not wait for the rank comes before it
TIMEOUT_S = 30

# The launcher starts a rank, and on SIGTERM ends it: at once, where DeepSpeed's gives each 30 s.
TREE = """
import os, pathlib, signal, subprocess, sys, time
role, log, saving_s = sys.argv[1], sys.argv[2], float(sys.argv[3])

def say(line):
    with open(log, "a") as file:
        file.write(f"{role} {line}\\n")

if role == "rank":
    told = []
    if log.endswith("deaf"):
        say("deaf")
        time.sleep(1)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: told.append(received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    say("ready")
    while not told:
        time.sleep(0.02)
    say(f"told {signal.Signals(told[0]).name}")
    end = time.monotonic() + saving_s
    while time.monotonic() < end:
        time.sleep(0.02)
    say("saved")
else:
    if log.endswith("alone"):
        say("alone")
        time.sleep(60)
    child = subprocess.Popen([sys.executable, __file__, "rank", *sys.argv[2:]])

    def end(received, _):
        say("ended")
        child.send_signal(signal.SIGKILL)
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    child.wait()
    say("left")
"""

# The real `launch`, whose Popen takes the tree's command for DeepSpeed's; forked for each case: torch takes seconds.
PARENT = """
import os, subprocess, sys
from pathlib import Path
import mslt.launcher as launcher

tree, saving_s, *logs = sys.argv[1:]
popen = subprocess.Popen
launcher.GRACE_S = 1
for log in logs:
    if not os.fork():
        Path(log + ".pid").write_text(str(os.getpid()))
        command = [sys.executable, tree, "launcher", log, saving_s]
        launcher.subprocess.Popen = lambda _, **how: popen(command, **how)
        status = launcher.launch(["recipe"], launcher.alone(1))
        Path(log + ".status").write_text(str(status))
        os._exit(0)
for _ in logs:
    os.wait()
"""


class Launched:
    """A process in `launch`, and what its tree has said so far."""

    def __init__(self, log: Path) -> None:
        self.log = log

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(int(Path(f"{self.log}.pid").read_text()))

    def said(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def wait_for(self, line: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while line not in self.said():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def status(self) -> int:
        """Of `launch`, once it is back."""
        status, deadline = Path(f"{self.log}.status"), time.monotonic() + TIMEOUT_S
        while not (status.exists() and status.read_text()):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)
        return int(status.read_text())


CASES = ("SIGTERM", "SIGUSR1", "deaf", "alone", "twice", "SIGINT")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Launched]]:
    """One for each case, side by side."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "tree.py").write_text(TREE)
    logs = [folder / case for case in CASES]
    command = [sys.executable, "-c", PARENT, folder / "tree.py", SAVING_S, *logs]
    parent = subprocess.Popen([*map(str, command)], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    yield {case: Launched(log) for case, log in zip(CASES, logs, strict=True)}
    for process in [*psutil.Process(parent.pid).children(recursive=True), psutil.Process(parent.pid)]:
        with suppress(psutil.Error):
            process.kill()
    parent.wait()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_told_to_leave_the_rank_alone_is_told_and_saves_before_anything_ends(
    started: dict[str, Launched], name: str
) -> None:
    launched = started[name]
    launched.wait_for("rank ready")
    launched.process.send_signal(signal.Signals[name])
    assert launched.status() == -signal.Signals[name]
    assert launched.said() == ["rank ready", "rank told SIGUSR1", "rank saved", "launcher left"]


def test_a_rank_told_before_it_listens_is_told_when_it_does(started: dict[str, Launched]) -> None:
    launched = started["deaf"]
    launched.wait_for("rank deaf")
    launched.process.send_signal(signal.SIGUSR1)
    assert launched.status() == -signal.SIGUSR1
    assert launched.said() == ["rank deaf", "rank ready", "rank told SIGUSR1", "rank saved", "launcher left"]


def test_told_to_leave_before_there_is_a_rank_it_starts_none(started: dict[str, Launched]) -> None:
    launched = started["alone"]
    launched.wait_for("launcher alone")
    launched.process.send_signal(signal.SIGUSR1)
    assert launched.status() == -signal.SIGUSR1
    assert launched.said() == ["launcher alone"]


def test_the_same_signal_again_goes_to_the_whole_group_and_is_the_status(started: dict[str, Launched]) -> None:
    launched = started["twice"]
    launched.wait_for("rank ready")
    tree = launched.process.children(recursive=True)
    assert len(tree) == 2
    for _ in range(2):
        launched.process.send_signal(signal.SIGTERM)
        launched.wait_for("rank told SIGUSR1")
    assert launched.status() == -signal.SIGTERM
    assert "rank saved" not in launched.said()
    assert "launcher ended" in launched.said()
    assert not psutil.wait_procs(tree, timeout=5)[1]


def test_ctrl_c_lets_nothing_be_saved(started: dict[str, Launched]) -> None:
    launched = started["SIGINT"]
    launched.wait_for("rank ready")
    tree = launched.process.children(recursive=True)
    launched.process.send_signal(signal.SIGINT)
    assert launched.status() == -signal.SIGINT
    assert launched.said() == ["rank ready"]
    assert not psutil.wait_procs(tree, timeout=5)[1]


@pytest.mark.parametrize(
    ("workers", "status"),
    [("time.sleep(1.4)", 0), ("time.sleep(1.4); sys.exit(3)", 3), ("time.sleep(60)", launcher.ELSEWHERE)],
    ids=["end well", "fail", "hang"],
)
def test_where_workers_of_another_host_have_ended_these_have_a_grace_to_end_by_themselves(
    monkeypatch: pytest.MonkeyPatch, workers: str, status: int
) -> None:
    popen, command = subprocess.Popen, [sys.executable, "-c", f"import sys, time; {workers}"]
    monkeypatch.setattr(launcher, "GRACE_S", 3)
    monkeypatch.setattr(launcher.subprocess, "Popen", lambda _, **how: popen(command, **how))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launcher.launch(["recipe"], launcher.alone(1), ended=lambda: True) == status


def test_loaders_told_to_end_load_on_until_the_rank_lets_them_go(shards: Path, tiny_plan: Plan) -> None:
    stage = tiny_plan.stages[0]
    samples = Samples(open_shards(shards, "train"), tiny_plan.data, stage.sequence_length, stage.seed)
    before = set(psutil.Process().children())
    batches = training_batches(samples, stage, 0, 1, 0, num_workers=2)
    found = [next(batches) for _ in range(2)]  # one of each worker: both have begun
    loaders = [child for child in psutil.Process().children() if child not in before]
    assert len(loaders) == 2
    for loader in loaders:
        loader.send_signal(signal.SIGTERM)
    found += batches
    expected = list(training_batches(samples, stage, 0, 1, 0, num_workers=0))
    assert len(found) == len(expected) == stage.steps
    for ours, theirs in zip(found, expected, strict=True):
        assert all((ours[name] == theirs[name]).all() for name in theirs)
    del batches
    assert not psutil.wait_procs(loaders, timeout=5)[1]


# The real `training_apart`, whose Popen starts this in place of `mslt train`; three are wanted, two at once. It leaves
# when it has been told so often.
TRAINS = """
import signal, sys, time

told = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda received, _: told.append(received))
print("ready", flush=True)
said, end = 0, time.monotonic() + 60
while said < int(sys.argv[1]) and time.monotonic() < end:
    time.sleep(0.02)
    for number in told[said:]:
        print(signal.Signals(number).name, flush=True)
        said += 1
sys.exit(2)
"""
STUDIES = """
import subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import mslt.launcher as launcher

folder, trains, times = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
popen = subprocess.Popen
launcher.subprocess.Popen = lambda _, **how: popen([sys.executable, "-c", trains, times], **how)
with launcher.training_apart([], 1, 2) as train, ThreadPoolExecutor(2) as pool:
    runs = [pool.submit(train, Path("recipe"), Path(f"run-{n}"), folder / f"{n}.log") for n in range(3)]
    for run in runs:
        print(run.exception(), flush=True)
"""


@pytest.mark.parametrize(
    ("signals", "reach"),
    [
        (["SIGTERM"], ["SIGTERM"]),
        (["SIGINT"], ["SIGTERM"]),  # Ctrl-C, too, may save
        (["SIGINT", "SIGINT"], ["SIGTERM", "SIGINT"]),
        (["SIGUSR1", "SIGTERM"], ["SIGTERM", "SIGTERM"]),
    ],
    ids=" ".join,
)
def test_a_signal_to_leave_reaches_all_that_train_apart_and_nothing_else_starts(
    tmp_path: Path, signals: list[str], reach: list[str]
) -> None:
    command = [sys.executable, "-c", STUDIES, str(tmp_path), TRAINS, str(len(signals))]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    study = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    deadline = time.monotonic() + 60

    def wait_until_both_said(lines: list[str]) -> None:
        while not all(log.exists() and log.read_text().split() == lines for log in logs[:2]):
            assert time.monotonic() < deadline, [log.read_text() for log in logs[:2] if log.exists()]
            assert study.poll() is None
            time.sleep(0.05)

    for number, name in enumerate(signals):
        wait_until_both_said(["ready", *reach[:number]])
        study.send_signal(signal.Signals[name])
    said, _ = study.communicate(timeout=30)
    assert said.splitlines() == [f"run-{number}: left at a signal; the same command goes on" for number in range(3)]
    assert [log.read_text().split() for log in logs[:2]] == [["ready", *reach]] * 2
    assert not logs[2].exists()


class Trainings:
    """Stands in for Popen: what was started, with which GPUs, and which GPUs were in use at once."""

    def __init__(self, num_at_once: int) -> None:
        self.together = threading.Barrier(num_at_once)
        self.commands: list[list[str]] = []
        self.gpus: list[str | None] = []
        self.in_use: list[str | None] = []
        self.shared: list[str | None] = []

    def __call__(self, command: list[str], env: dict[str, str], **how: Any) -> SimpleNamespace:
        assert how["start_new_session"], "or a Ctrl-C would reach it twice"
        gpus = env.get("CUDA_VISIBLE_DEVICES")
        self.shared += [gpus] if gpus in self.in_use else []
        self.in_use.append(gpus)
        self.commands.append(command)
        self.gpus.append(gpus)

        def wait() -> int:
            self.together.wait(timeout=20)
            self.in_use.remove(gpus)
            return 0

        return SimpleNamespace(wait=wait)


def trained_apart(
    folder: Path, patch: pytest.MonkeyPatch, num_runs: int, num_workers: int, num_at_once: int
) -> Trainings:
    trainings = Trainings(num_at_once)
    patch.setattr(launcher.subprocess, "Popen", trainings)
    with (
        launcher.training_apart(["--shards", "here"], num_workers, num_at_once) as train,
        ThreadPoolExecutor(num_at_once) as pool,
    ):
        list(pool.map(lambda n: train(folder / "r.yaml", folder / f"run-{n}", folder / f"{n}.log"), range(num_runs)))
    return trainings


@pytest.mark.parametrize(
    ("visible", "num_workers", "num_at_once", "dealt"),
    [
        (None, 2, 2, {"0,1", "2,3"}),
        (None, 1, 4, {"0", "1", "2", "3"}),
        (None, 1, 2, {"0", "1"}),
        (None, 4, 1, {"0,1,2,3"}),
        ("3, 1,0,2", 2, 2, {"3,1", "0,2"}),
    ],
)
def test_gpus_are_dealt_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    num_workers: int,
    num_at_once: int,
    dealt: set[str],
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    found = trained_apart(tmp_path, monkeypatch, 3 * num_at_once, num_workers, num_at_once)
    assert set(found.gpus) == dealt
    assert len(found.gpus) == 3 * num_at_once
    assert not found.shared, "a GPU that two runs had at once"
    for command in found.commands:
        assert command[1:5] == ["-m", "mslt.cli.main", "train", str(tmp_path / "r.yaml")]
        assert command[7:] == ["--workers", str(num_workers), "--shards", "here"]
    assert {command[6] for command in found.commands} == {str(tmp_path / f"run-{n}") for n in range(3 * num_at_once)}


def test_without_gpus_none_are_dealt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for visible in ("", "7"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert trained_apart(tmp_path, monkeypatch, 4, 3, 2).gpus == [visible] * 4


@pytest.mark.parametrize(("num_workers", "num_at_once"), [(2, 3), (5, 1), (1, 5)])
def test_more_workers_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, num_workers: int, num_at_once: int
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    says = f"--at-once {num_at_once} with --workers {num_workers}: this machine shows 4 GPUs"
    with pytest.raises(MsltError, match=says), launcher.training_apart([], num_workers, num_at_once):
        raise AssertionError("nothing may be trained")


def test_training_apart_leaves_the_handlers_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (*launcher.SAVE_AND_LEAVE, *launcher.LEAVE)
    before = [signal.getsignal(number) for number in numbers]
    trained_apart(tmp_path, monkeypatch, 1, 1, 1)
    with launcher.training_apart([], 1, 1):
        assert not {signal.getsignal(number) for number in numbers} & set(before)
    with pytest.raises(MsltError, match="of another kind"), launcher.training_apart([], 1, 1):
        raise MsltError("of another kind")
    assert [signal.getsignal(number) for number in numbers] == before


TIMED = [{"forward": [1.0, 2.0], "data": [0.5, 0.25]}]


@pytest.mark.parametrize("status", [0, 1, -signal.SIGTERM, -signal.SIGINT])
@pytest.mark.parametrize("writes", [True, False])
def test_a_timing_counts_only_where_its_workers_ended_well(
    tmp_path: Path, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch, status: int, writes: bool
) -> None:
    """Ranks that time do not hear SIGUSR1: signalled, they may write all the same."""
    folders = []

    def launch(arguments: list[str], place: Place) -> int:
        option, plan, out, *shards = arguments
        assert (option, shards, place.num_workers) == ("--time", ["--shards", str(tmp_path)], 3)
        assert Plan.model_validate_json(Path(plan).read_text()) == tiny_plan
        folders.append(Path(out).parent)
        if writes:
            Path(out).write_text(json.dumps(TIMED))
        return status

    monkeypatch.setattr(launcher, "launch", launch)
    if status == 0 and writes:
        assert launcher.time_stages_here(tiny_plan, tmp_path, 3) == TIMED
    else:
        why = "left at a signal" if status < 0 else rf"the workers stopped \(launcher's status {status}, "
        with pytest.raises(MsltError, match=f"timing steps: {why}"):
            launcher.time_stages_here(tiny_plan, tmp_path, 3)
    (folder,) = folders
    assert not folder.exists()
