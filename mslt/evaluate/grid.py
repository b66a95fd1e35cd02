"""Many jobs over the devices of this machine, and of others that share the folder: each job is a file that is there
when it is done, and a lock that whoever works on it holds.

So a killed grid goes on where it stopped, and the same command on another machine helps.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

from mslt.errors import MsltError
from mslt.files import lock_alone, wait_until_seen, write_json, write_text
from mslt.orphans import end_with

ATTEMPTS = 2
LOOK_S = 2.0  # between looks at jobs that others work on
_DONE = "done"  # in a job's lock file, for who is not yet shown the job's own by a network file system


@dataclass(frozen=True)
class Job:
    """`path` is written with what the function of `run_jobs` finds; `cost` is in any unit that all jobs share."""

    path: Path
    cost: float
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}, {self.path.stem}"

    @property
    def lock(self) -> Path:
        return self.path.with_suffix(".lock")

    @property
    def failure(self) -> Path:
        return self.path.with_suffix(".failed.txt")

    def forget(self) -> None:
        """Let it be done again."""
        self.path.unlink(missing_ok=True)
        if self.lock.is_file():
            os.truncate(self.lock, 0)


Function = Callable[..., dict[str, Any]]
Tell = Callable[[str], None]


@dataclass
class _Grid:
    """What all threads share. `waiting` holds what nobody here works on and is not done, costly jobs first; `tried` the
    devices on which a job failed."""

    jobs: tuple[Job, ...]
    devices: tuple[str, ...]
    tell: Tell
    waiting: list[Job]
    tried: dict[Job, list[str]] = field(default_factory=dict)
    failed: list[Job] = field(default_factory=list)
    num_running: int = 0
    must_stop: bool = False
    began: float = field(default_factory=time.monotonic)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.cost_before = self.cost_left()
        if self.waiting:
            num_done = len(self.jobs) - len(self.waiting)
            self.tell(f"{num_done} of {len(self.jobs)} done before, {len(self.devices)} at once")

    def cost_left(self) -> float:
        """Of all that is not done, by whomever."""
        return sum(job.cost for job in self.jobs if not job.path.is_file())

    def take(self, device: str, stack: ExitStack) -> tuple[Job, IO[str]] | None:
        """A job that nobody works on, with its lock, which `stack` holds; None when none is left. Waits for what others
        work on: it may fail. A job that failed on this device is left to another one, if there is one."""
        while True:
            with self.guard:
                self.waiting = [job for job in self.waiting if not job.path.is_file()]
                if self.must_stop or not (self.waiting or self.num_running):
                    return None
                locked = self._locked(device, stack)
                if locked is not None:
                    self.waiting.remove(locked[0])
                    self.num_running += 1
            if locked is None:
                time.sleep(LOOK_S)
                continue
            job, lock = locked
            lock.seek(0)
            if lock.read() == _DONE:
                wait_until_seen(job.path.is_file)
            if not job.path.is_file():
                lock.truncate(0)  # its file was taken away since
                return job, lock
            stack.close()
            with self.guard:
                self.num_running -= 1

    def _locked(self, device: str, stack: ExitStack) -> tuple[Job, IO[str]] | None:
        """The first job for this device that nobody works on."""
        for job in self.waiting:
            if device in self.tried.get(job, ()) and len(set(self.devices)) > 1:
                continue
            try:
                return job, stack.enter_context(lock_alone(job.lock, "taken"))
            except MsltError:
                continue
        return None

    def done(self, job: Job) -> None:
        with self.guard:
            self.num_running -= 1
            left = self.cost_left()
            hours = (time.monotonic() - self.began) / (self.cost_before - left) * left / 3600
            num_done = sum(other.path.is_file() for other in self.jobs)
            said = f"{num_done} of {len(self.jobs)}: {job.name}"
            self.tell(f"{said}; about {hours:.1f} h left" if left else said)

    def failure(self, job: Job, device: str, error: BaseException) -> None:
        """Write down and tell; the job waits for its next attempt, if it has one."""
        write_text(job.failure, "".join(traceback.format_exception(error)))
        with self.guard:
            self.num_running -= 1
            tried = self.tried.setdefault(job, [])
            tried.append(device)
            said = f"failed: {job.name}: {type(error).__name__}: {error} (see {job.failure})"
            if len(tried) < ATTEMPTS:
                self.waiting.insert(0, job)
                self.tell(f"{said}; once more")
            else:
                self.failed.append(job)
                self.tell(said)


def run_jobs(jobs: Sequence[Job], function: Function, devices: Sequence[str], tell: Tell) -> list[Job]:
    """Do what is not done: `function(*job.arguments, device)`, in a process for each device; what it returns becomes
    the job's file. Returns those that failed ATTEMPTS times; their tracebacks lie beside them. A user's mistake
    (MsltError), or a file that cannot be written, ends all and is raised."""
    undone = sorted((job for job in jobs if not job.path.is_file()), key=lambda job: -job.cost)
    for job in undone:
        job.path.parent.mkdir(parents=True, exist_ok=True)
    grid = _Grid(tuple(jobs), tuple(devices), tell, undone)
    with ThreadPoolExecutor(len(devices)) as threads:
        futures = [threads.submit(_work, grid, function, device) for device in devices]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            grid.must_stop = True
        except KeyboardInterrupt:
            print("left at a signal; the same command goes on", file=sys.stderr, flush=True)
            os._exit(130)  # the system ends the processes, and files are written whole
    for future in futures:
        future.result()
    return grid.failed


def _work(grid: _Grid, function: Function, device: str) -> None:
    """Job after job in one process, which the system ends with this one; a new one after a failure, which may have left
    the device unusable in the old."""
    pool = _process()
    try:
        while True:
            with ExitStack() as stack:
                taken = grid.take(device, stack)
                if taken is None:
                    return
                job, lock = taken
                try:
                    found = pool.submit(function, *job.arguments, device).result()
                except MsltError:
                    raise
                except Exception as error:  # whatever a library raises: it is written down, and counted
                    pool.shutdown(wait=False)
                    pool = _process()
                    grid.failure(job, device, error)
                else:
                    write_json(job.path, found)
                    job.failure.unlink(missing_ok=True)
                    lock.write(_DONE)
                    lock.flush()
                    grid.done(job)
    finally:
        pool.shutdown()


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with, initargs=(os.getpid(),))
