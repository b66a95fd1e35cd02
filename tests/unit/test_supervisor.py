"""When a run is started again, and when not: a launcher stood in for by a script of what it leaves behind."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mslt.errors import Left, MsltError
from mslt.failures import forget_failures, note_failure
from mslt.meeting import NotMetError
from mslt.nodes import Place
from mslt.plan import Plan
from mslt.rundir import RunDir
from mslt.supervisor import train_to_the_end

PLACE = Place(("here",), 4, 0, 29500)


class Launcher:
    """Does in each start what stands in `script`: finish a stage, write a checkpoint, fail with a status, or leave."""

    def __init__(self, run: RunDir, plan: Plan, script: list[str]) -> None:
        self.run, self.plan, self.script = run, plan, script
        self.starts, self.waits = 0, []

    def meet(self) -> Place | None:
        """`late`: the others do not come; `without`: they bring the run to its end meanwhile."""
        if self.script[0] == "late":
            self.script.pop(0)
            raise NotMetError("hosts: fewer than 2 came")
        if self.script[0] == "without":
            for stage in range(3):
                folder = self.run.stage(stage)
                folder.path.mkdir(parents=True, exist_ok=True)
                folder.summary.write_text("{}")
            return None
        return PLACE

    def __call__(self, place: Place) -> int:
        assert place is PLACE
        self.starts += 1
        forget_failures(self.run.logs, range(4))
        status = 0
        for word in self.script.pop(0).split():
            stage = self.run.stage(self.run.first_unfinished(self.plan))
            kind, _, value = word.partition(":")
            if kind == "done":
                stage.path.mkdir(parents=True, exist_ok=True)
                stage.summary.write_text("{}")
            elif kind == "checkpoint":
                folder = stage.checkpoints / f"step-{int(value):08d}"
                folder.mkdir(parents=True)
                (folder / "manifest.json").write_text("{}")
            elif kind == "error":
                rank, _, which = value.partition(":")
                self.run.logs.mkdir(exist_ok=True)
                note_failure(self.run.logs, int(rank), "stage 1, step 4", "No room", which or "error")
            elif kind == "left":
                self.run.left.write_text(json.dumps({"port": int(value or PLACE.port)}))
            else:
                status = int(value)
        return status


Make = Callable[[list[str]], Launcher]


@pytest.fixture
def launcher(tmp_path: Path, tiny_plan: Plan) -> Make:
    assert len(tiny_plan.stages) == 3
    return lambda script: Launcher(RunDir(tmp_path), tiny_plan, script)


def supervise(launcher: Launcher, restarts: int) -> None:
    train_to_the_end(launcher.run, launcher.plan, launcher.meet, launcher, restarts, launcher.waits.append)


def test_a_run_that_does_not_fail_needs_no_restart(launcher: Make) -> None:
    one = launcher(["done done done"])
    supervise(one, 0)
    assert (one.starts, one.waits) == (1, [])


def test_a_start_for_each_stage_is_no_restart(launcher: Make) -> None:
    one = launcher(["done", "done", "done"])
    supervise(one, 0)
    assert (one.starts, one.waits) == (3, [])


def test_it_goes_on_from_a_failure_and_says_so(launcher: Make, capsys: pytest.CaptureFixture[str]) -> None:
    one = launcher(["done checkpoint:5 error:3 status:1", "checkpoint:9 status:247", "done done"])
    supervise(one, 2)
    assert (one.starts, one.waits) == (3, [5.0, 5.0])
    first, second = capsys.readouterr().err.splitlines()
    assert "stopped in stage 2 of 3 (rank 3 on " in first
    assert first.endswith("stage 1, step 4: No room); starting again in 5 s, 1 restarts are left")
    assert "launcher's status 247" in second


def test_status_0_with_an_unfinished_stage_is_a_failure(launcher: Make) -> None:
    one = launcher(["checkpoint:5", "done done done"])
    with pytest.raises(MsltError, match=r"stopped in stage 1 of 3 \(launcher's status 0, .*the same command again"):
        supervise(one, 0)


def test_a_crash_loop_is_left(launcher: Make) -> None:
    one = launcher(["checkpoint:5 status:1", "status:1", "status:1", "error:1 status:1", "done done done"])
    with pytest.raises(MsltError, match=r"rank 1 on .*: No room\); 3 starts came no farther"):
        supervise(one, 99)
    assert one.waits == [5.0, 10.0, 20.0]


def test_ranks_that_lose_each_other_again_and_again_are_a_crash_loop(launcher: Make) -> None:
    """What ends one of them may leave no word: the system, for want of memory."""
    one = launcher(["checkpoint:5 error:1:peer status:247", *["error:1:peer status:247"] * 3, "done done done"])
    with pytest.raises(MsltError, match="3 starts came no farther"):
        supervise(one, 99)
    assert one.starts == 4


def test_hosts_that_stay_away_are_none(launcher: Make) -> None:
    one = launcher(["late"] * 9 + ["done done done"])
    supervise(one, 9)
    assert one.waits == [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0, 300.0]


def test_hosts_that_are_late_cost_a_restart(launcher: Make) -> None:
    one = launcher(["late", "late", "done done done"])
    supervise(one, 2)
    assert (one.starts, one.waits) == (1, [10.0, 20.0])


def test_hosts_that_do_not_come_at_all_are_said(launcher: Make) -> None:
    one = launcher(["late"])
    with pytest.raises(MsltError, match=r"stopped in stage 1 of 3 \(hosts: fewer than 2 came\); the same command"):
        supervise(one, 0)


def test_a_host_that_was_not_needed_ends_with_the_others(launcher: Make) -> None:
    one = launcher(["without"])
    supervise(one, 0)
    assert one.starts == 0


@pytest.mark.parametrize("status", [-signal.SIGINT, -signal.SIGHUP])
def test_ctrl_c_is_no_failure_to_go_on_from(launcher: Make, status: int) -> None:
    one = launcher([f"checkpoint:5 status:{status}", "done done done"])
    with pytest.raises(MsltError, match="stopped"):
        supervise(one, 99)
    assert one.starts == 1


def test_a_mistake_is_not_made_again(launcher: Make) -> None:
    one = launcher(["checkpoint:5 error:2:mistake error:0:peer status:1", "done done done"])
    with pytest.raises(MsltError, match=r"stopped in stage 1 of 3 \(rank 2 on .*: No room\); the same command again"):
        supervise(one, 99)
    assert one.starts == 1


def test_what_was_left_at_an_earlier_start_is_not_left_now(launcher: Make) -> None:
    one = launcher(["checkpoint:5 left:1 status:1", "done done done"])
    supervise(one, 1)
    assert one.starts == 2


@pytest.mark.parametrize("ends", [f"status:{-signal.SIGTERM}", f"status:{-signal.SIGUSR1}", "left"])
def test_a_run_that_was_told_to_leave_is_left(launcher: Make, ends: str) -> None:
    """By a signal here, or on another host: the workers say so then."""
    one = launcher([f"checkpoint:5 {ends}", "done done done"])
    with pytest.raises(Left, match="left in stage 1 of 3; the same command goes on"):
        supervise(one, 99)
    assert one.starts == 1
