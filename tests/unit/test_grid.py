"""Jobs over devices: done once, shared by locks, failures told and tried again, kills borne."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mslt.errors import MsltError
from mslt.evaluate.grid import Job, run_jobs


def answer(number: int, folder: str, device: str) -> dict[str, int]:
    """What the jobs of these tests do: number 3 fails always, 4 at its first attempt, 5 dies at its first."""
    with open(Path(folder) / "calls.txt", "a") as file:
        file.write(f"{number} {device}\n")
    attempts = sum(line.split()[0] == str(number) for line in (Path(folder) / "calls.txt").read_text().splitlines())
    if number == 3 or (number == 4 and attempts == 1):
        raise ValueError(f"no answer to {number}")
    if number == 5 and attempts == 1:
        os._exit(9)
    if number == 6:
        raise MsltError("six: a user's mistake; mend it")
    return {"answer": number * 10}


def slow(number: int, folder: str, device: str) -> dict[str, int]:
    time.sleep(0.5)
    return answer(number, folder, device)


broken: list[int] = []  # of one process


def breaks_its_process(number: int, folder: str, device: str) -> dict[str, int]:
    """The first job of a process fails, and all after it in the same process."""
    with open(Path(folder) / "calls.txt", "a") as file:
        file.write(f"{number} {device}\n")
    if broken or len(calls(Path(folder))) == 1:
        broken.append(number)
        raise RuntimeError("the device is unusable")
    return {"answer": number}


def fails_on_a(number: int, folder: str, device: str) -> dict[str, int]:
    time.sleep(0.2)
    if device == "a":
        raise RuntimeError("this device is broken")
    return {"answer": number}


def jobs_in(folder: Path, numbers: list[int]) -> list[Job]:
    return [Job(folder / "cells" / f"{number}.json", number, (number, str(folder))) for number in numbers]


def done(folder: Path) -> int:
    return len(list((folder / "cells").glob("*.json")))


def calls(folder: Path) -> list[str]:
    return (folder / "calls.txt").read_text().splitlines()


def test_each_job_is_done_once_the_costly_first(tmp_path):
    said: list[str] = []
    assert run_jobs(jobs_in(tmp_path, [1, 2, 7]), answer, ["cpu"], said.append) == []
    assert calls(tmp_path) == ["7 cpu", "2 cpu", "1 cpu"]
    assert json.loads((tmp_path / "cells" / "7.json").read_text()) == {"answer": 70}
    assert said[0] == "0 of 3 done before, 1 at once"
    assert said[1].startswith("1 of 3: cells, 7; about")
    assert said[-1] == "3 of 3: cells, 1"
    assert run_jobs(jobs_in(tmp_path, [1, 2, 7]), answer, ["cpu"], said.append) == []
    assert len(calls(tmp_path)) == 3


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]])
def test_a_failure_is_told_and_tried_once_more(tmp_path, devices):
    said: list[str] = []
    failed = run_jobs(jobs_in(tmp_path, [1, 3, 4, 5]), answer, devices, said.append)
    assert [job.path.stem for job in failed] == ["3"]
    assert "no answer to 3" in failed[0].failure.read_text()
    assert sum("failed: cells, 3" in line for line in said) == 2
    assert sum("failed: cells, 4" in line for line in said) == 1
    assert sum("failed: cells, 5" in line for line in said) == 1, "a process that died"
    for number in (1, 4, 5):
        assert (tmp_path / "cells" / f"{number}.json").is_file()
        assert not (tmp_path / "cells" / f"{number}.failed.txt").exists()


def test_what_a_failure_leaves_in_a_process_ends_with_it(tmp_path):
    assert run_jobs(jobs_in(tmp_path, [1, 2]), breaks_its_process, ["cpu"], print) == []


def test_a_broken_device_takes_no_job_with_it(tmp_path):
    """What failed on one device is tried on another; only the broken one fails."""
    assert run_jobs(jobs_in(tmp_path, [1, 2, 4, 7]), fails_on_a, ["a", "b"], print) == []
    assert done(tmp_path) == 4


def test_what_was_done_is_forgotten_and_done_again(tmp_path, monkeypatch):
    jobs = jobs_in(tmp_path, [1, 2])
    run_jobs(jobs, answer, ["cpu"], print)
    jobs[0].forget()
    monkeypatch.setattr("mslt.evaluate.grid.wait_until_seen", lambda is_there: pytest.fail("nothing is to be seen"))
    run_jobs(jobs, answer, ["cpu"], print)
    assert calls(tmp_path) == ["2 cpu", "1 cpu", "1 cpu"]


def test_what_another_machine_shows_late_keeps_nobody_else_waiting(tmp_path, monkeypatch):
    jobs = jobs_in(tmp_path, [1, 2])
    jobs[1].lock.parent.mkdir()
    jobs[1].lock.write_text("done")  # its file is not seen yet

    def shown(is_there):
        while not jobs[0].path.is_file():
            time.sleep(0.01)
        jobs[1].path.write_text("{}")

    monkeypatch.setattr("mslt.evaluate.grid.wait_until_seen", shown)
    assert run_jobs(jobs, answer, ["a", "b"], print) == []
    assert [line.split()[0] for line in calls(tmp_path)] == ["1"]


def test_a_full_disk_ends_all(tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mslt.evaluate.grid.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        run_jobs(jobs_in(tmp_path, [1, 2, 7]), answer, ["cpu"], print)
    assert calls(tmp_path) == ["7 cpu"]


def test_a_users_mistake_ends_all(tmp_path):
    with pytest.raises(MsltError, match="a user's mistake"):
        run_jobs(jobs_in(tmp_path, [1, 6]), answer, ["cpu"], lambda line: None)
    assert not (tmp_path / "cells" / "1.json").exists()


SCRIPT = """
import sys
from pathlib import Path
from mslt.evaluate.grid import run_jobs
from tests.unit.test_grid import jobs_in, slow
if __name__ == "__main__":
    run_jobs(jobs_in(Path(sys.argv[1]), [1, 2, 7, 8]), slow, ["a", "b"], print)
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    return subprocess.Popen([sys.executable, str(script), str(folder)], env=environment, start_new_session=True)


def test_two_that_share_a_folder_share_the_work_and_a_killed_one_is_made_up_for(tmp_path):
    first, second = start(tmp_path), start(tmp_path)
    while not done(tmp_path):
        time.sleep(0.05)
    workers = psutil.Process(first.pid).children(recursive=True)
    assert workers
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=120) == 0
    assert done(tmp_path) == 4
    numbers = [line.split()[0] for line in calls(tmp_path)]
    assert set(numbers) == {"1", "2", "7", "8"}
    assert len(numbers) <= 6, "only what the killed one had begun was done again"
    assert not psutil.wait_procs(workers, timeout=10)[1], "the processes of a killed one end with it"
