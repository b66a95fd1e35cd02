"""Who takes part in a start: supervisors of several hosts, each in a thread of its own, over the loopback."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from mslt import meeting
from mslt.errors import MsltError
from mslt.files import write_json
from mslt.meeting import Meeting, NotMetError
from mslt.nodes import Hosts, Place, free_port
from mslt.plan import Plan
from mslt.rundir import RunDir

MINUTES = 0.2
Make = Callable[..., list[Meeting]]


@pytest.fixture
def make(tmp_path: Path, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Meetings of so many hosts of the plan in the run directory `tmp_path`. Its batches are of 8: three hosts cannot
    share one."""
    monkeypatch.setattr(meeting, "LAST_CALL_S", 2)
    monkeypatch.setattr(meeting, "RETRY_S", 0.2)
    monkeypatch.setattr(meeting, "GONE_S", 1.0)
    monkeypatch.setattr(meeting, "STORE_S", 2)
    port = free_port()

    def made(number: int, min_nodes: int, minutes: float = MINUTES) -> list[Meeting]:
        hosts = Hosts(tmp_path / "hosts", tuple(f"127.0.0.{host + 1}" for host in range(number)), 1)
        return [Meeting(hosts, host, port, min_nodes, minutes, tiny_plan, RunDir(tmp_path)) for host in range(number)]

    return made


def places(meetings: list[Meeting]) -> list[Future[Place | None]]:
    pool = ThreadPoolExecutor(len(meetings))
    found = [pool.submit(one.place) for one in meetings]
    pool.shutdown(wait=False)
    return found


def die(one: Meeting) -> None:
    """As with its process: it shows no more that it lives."""
    one._handler._stop_heartbeats()  # type: ignore[union-attr]


def finish(run: RunDir) -> None:
    for stage in range(3):
        run.stage(stage).path.mkdir(parents=True, exist_ok=True)
        run.stage(stage).summary.write_text("{}")


def test_all_agree_on_order_and_port_and_on_another_port_the_next_time(make: Make) -> None:
    meetings = make(2, 2)
    starts = [[place.result(30) for place in places(meetings)] for _ in range(2)]
    for first, second in starts:
        assert first is not None
        assert second == Place(("127.0.0.1", "127.0.0.2"), 1, 1, first.port)
        assert (first.names, first.node_rank) == (second.names, 0)
    assert starts[0][0] != starts[1][0]


def test_hosts_of_a_start_hear_that_one_has_ended_and_not_of_the_start_before(make: Make) -> None:
    meetings = make(2, 2)
    [place.result(30) for place in places(meetings)]
    assert not any(one.has_ended() for one in meetings)
    meetings[1].tell_end()
    assert all(one.has_ended() for one in meetings)
    [place.result(30) for place in places(meetings)]
    assert not any(one.has_ended() for one in meetings)


def test_enough_hosts_go_on_and_one_that_comes_late_ends_with_the_run(make: Make, tmp_path: Path) -> None:
    first, late = make(2, 1, minutes=0.02)
    place = first.place()
    assert place is not None
    assert place.names == ("127.0.0.1",)
    (waits,) = places([late])
    for step in range(4):  # for several times as long as hosts wait for each other
        time.sleep(1.5)
        folder = RunDir(tmp_path).stage(0).checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True)
        write_json(folder / "manifest.json", {})
        assert not waits.done()
    finish(RunDir(tmp_path))
    first.close()
    assert waits.result(30) is None


def test_a_spare_host_takes_part_when_another_does_not_come_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MISSED_BEATS", 1)
    meetings = make(3, 2)
    *pair, spare = places(meetings)
    assert [place.result(30) is not None for place in pair] == [True, True]
    assert not spare.done()
    die(meetings[1])
    again = meetings[0].place()
    assert again is not None
    assert again.names == ("127.0.0.1", "127.0.0.3")
    assert spare.result(30) == Place(again.names, 1, 1, again.port)


@pytest.mark.parametrize("left", [False, True])
def test_a_spare_host_ends_with_the_run(make: Make, tmp_path: Path, left: bool) -> None:
    run = RunDir(tmp_path)
    write_json(run.left, {"stage": 1, "port": 1})  # of an earlier start
    meetings = make(3, 2)
    *pair, spare = places(meetings)
    first = pair[0].result(30)
    assert first is not None
    time.sleep(1)
    assert not spare.done()
    if left:
        write_json(run.left, {"stage": 1, "port": first.port})
    else:
        finish(run)
    assert spare.result(30) is None


def test_a_host_that_gives_up_ends_those_that_cannot_do_without(make: Make) -> None:
    meetings = make(2, 2)
    [place.result(30) for place in places(meetings)]
    meetings[1].close()
    with pytest.raises(MsltError, match=r"127\.0\.0\.1: the run was given up on another host"):
        meetings[0].place()


def test_a_host_that_gives_up_does_not_end_those_that_can(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MISSED_BEATS", 1)
    meetings = make(2, 1)
    [place.result(30) for place in places(meetings)]
    meetings[1].close()
    die(meetings[1])
    place = meetings[0].place()
    assert place is not None
    assert place.names == ("127.0.0.1",)


def test_too_few_hosts_are_late(make: Make) -> None:
    first, _ = make(2, 2, minutes=0.02)
    with pytest.raises(NotMetError, match=r"hosts: fewer than 2 hosts came within 0\.02 minutes; `mslt doctor"):
        first.place()


def test_a_first_host_that_is_not_there_is_late_too(make: Make) -> None:
    _, second = make(2, 2, minutes=0.02)
    with pytest.raises(
        NotMetError, match=r"127\.0\.0\.1: not reached at 127\.0\.0\.1:\d+ within 0\.02 minutes \(.+\); `mslt"
    ):
        second.place()


def test_a_port_in_use_is_said_at_once(make: Make, tmp_path: Path, tiny_plan: Plan) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        hosts = Hosts(tmp_path / "hosts", ("127.0.0.1", "127.0.0.2"), 1)
        one = Meeting(hosts, 0, taken.getsockname()[1], 2, MINUTES, tiny_plan, RunDir(tmp_path))
        with pytest.raises(MsltError, match=r"--master-port \d+: is in use on 127\.0\.0\.1, perhaps by an earlier run"):
            one.place()


def test_numbers_that_do_not_go_with_the_hostfile(make: Make, tmp_path: Path, tiny_plan: Plan) -> None:
    hosts = Hosts(tmp_path / "hosts", ("a", "b", "c", "d"), 2)
    with pytest.raises(MsltError, match=r"--node-rank 4: .*hosts names 4 hosts, counted from 0"):
        Meeting(hosts, 4, 29500, 4, MINUTES, tiny_plan, RunDir(tmp_path))
    with pytest.raises(MsltError, match=r"--min-nodes 3: with 2 workers each, .* to 1, 2, 4 of the hosts in"):
        Meeting(hosts, 0, 29500, 3, MINUTES, tiny_plan, RunDir(tmp_path))
