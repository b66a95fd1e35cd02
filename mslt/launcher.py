"""Starting DeepSpeed's launcher on this machine, and ending it: none of its processes outlives the call.

A run is judged by its DONE markers, not by the launcher's exit status, which can be 0 with dead or orphaned ranks.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import psutil
import torch

from mslt.cost import for_timing
from mslt.engine.ds_config import zero_stage
from mslt.errors import MsltError
from mslt.plan import Plan, with_micro_batches

GRACE_S = 10  # between asking the group to end and ending it
LEAVE_S = 300  # between asking the workers to save and leave, and ending the group
SAVE_AND_LEAVE = (signal.SIGTERM, signal.SIGUSR1)  # SLURM warns with the second, and ends a job with the first
LEAVE = (signal.SIGINT, signal.SIGHUP)


def num_workers_here(asked: int | None) -> int:
    """The workers asked for, by default one a GPU, or one. MsltError when they are more than the GPUs there are."""
    gpus = torch.cuda.device_count()
    if asked is not None and gpus and asked > gpus:
        raise MsltError(f"--workers {asked}: this machine shows {gpus} GPUs; each worker needs one of its own")
    return asked or max(gpus, 1)


def launch(arguments: list[str], num_workers: int) -> int:
    """Start the workers (mslt.cli.worker with `arguments`) on this machine through DeepSpeed's launcher, wait, and
    return its exit status.

    At a signal of SAVE_AND_LEAVE the ranks alone are told, by SIGUSR1, and have LEAVE_S to go: on SIGTERM DeepSpeed's
    own processes end them, and torch's loader processes end themselves. The same one again, and those of LEAVE, go to
    the whole process group. The first signal is the status then, negative.
    """
    environment = dict(os.environ)
    where = ["--num_gpus", str(num_workers)]
    if torch.cuda.is_available():
        where = ["--include", f"localhost:{','.join(_visible_gpus(environment)[:num_workers])}"]
    elif not torch.accelerator.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // num_workers, 1)))
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--hostfile", os.devnull, *where),
        *("--master_addr", "127.0.0.1", "--master_port", str(_free_port())),
        *("--no_local_rank", "--module", "mslt.cli.worker"),
        *arguments,
    ]
    received: list[int] = []
    group: list[int] = []

    def stop(signal_number: int, _: FrameType | None) -> None:
        received.append(signal_number)
        for leader in group:
            is_first = signal_number in SAVE_AND_LEAVE and received.count(signal_number) == 1
            ranks = _ranks(leader) if is_first else []
            for rank in ranks:
                with suppress(psutil.Error):
                    rank.send_signal(signal.SIGUSR1)
            if not ranks:
                with suppress(ProcessLookupError):
                    os.killpg(leader, signal_number)

    previous = {number: signal.signal(number, stop) for number in (*SAVE_AND_LEAVE, *LEAVE)}
    try:
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_ignore_what_is_for_the_ranks
        )
        group.append(process.pid)
        if received:
            stop(received[0], None)
        status = None
        while status is None and not received:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=1)
        deadline = time.monotonic() + LEAVE_S
        while received and _group_lives(process.pid) and time.monotonic() < deadline:
            process.poll()  # a child that is not waited for keeps its group alive
            time.sleep(0.1)
        return -received[0] if received else int(status or 0)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for leader in group:
            _end_group(leader)


def time_stages_here(plan: Plan, shards: Path, num_workers: int) -> list[dict[str, list[float]]]:
    """What the parts of a step of each stage take (see mslt.measure), in workers as a run would have them."""
    timed: list[dict[str, list[float]]] = _measured("--time", plan, shards, num_workers)
    return timed


def with_fastest_micro_batches(plan: Plan, shards: Path, num_workers: int) -> Plan:
    """The plan with the micro-batch that is fastest in each stage (see mslt.measure), for a run of so many workers;
    measured on one of them."""
    print("micro-batches: measuring what is fastest in each stage", file=sys.stderr)
    of_one = [stage.model_copy(update={"batch_size": stage.batch_size // num_workers}) for stage in plan.stages]
    of_one = [for_timing(stage) for stage in of_one]
    sizes: list[int] = _measured("--micro-batches", plan.model_copy(update={"stages": tuple(of_one)}), shards, 1)
    print(f"micro-batches of a worker: {', '.join(map(str, sizes))}", file=sys.stderr)
    return with_micro_batches(plan, sizes)


def _measured(option: str, plan: Plan, shards: Path, num_workers: int) -> Any:
    """What workers that are started with this option find out of the plan, and train nothing."""
    if zero_stage(plan.engine) == 3:
        raise MsltError("ZeRO-3 cannot be timed: it takes a launch for every stage; take an engine of zero0 to zero2")
    with tempfile.TemporaryDirectory() as folder:
        plan_file, out = Path(folder) / "plan.json", Path(folder) / "timed.json"
        plan_file.write_text(plan.model_dump_json())
        status = launch([option, str(plan_file), str(out), "--shards", str(shards)], num_workers)
        if status < 0:
            raise MsltError("timing steps: left at a signal; the same command times them again")
        if status != 0 or not out.exists():
            raise MsltError(f"timing steps: the workers stopped (launcher's status {status}, the reason stands above)")
        return json.loads(out.read_text())


@contextmanager
def training_apart(
    options: list[str], num_workers: int, num_at_once: int
) -> Iterator[Callable[[Path, Path, Path], None]]:
    """Gives a function that trains a recipe to its end by `mslt train`, in a process of its own, and logs what it says;
    as many threads as `num_at_once` may call it. At a signal to leave all of them save and leave, and the function
    raises MsltError, also for what it has not begun. GPUs are dealt out; MsltError where they are too few."""
    num_gpus = torch.cuda.device_count()
    if num_gpus and num_at_once * num_workers > num_gpus:
        raise MsltError(
            f"--at-once {num_at_once} with --workers {num_workers}: this machine shows {num_gpus} GPUs; each worker "
            "needs one of its own"
        )
    environments: SimpleQueue[dict[str, str]] = SimpleQueue()
    visible = _visible_gpus(dict(os.environ)) if num_gpus else []
    for index in range(num_at_once):
        mine = visible[index * num_workers : (index + 1) * num_workers]
        environments.put({**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else dict(os.environ))
    running: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(signal_number: int, _: FrameType | None) -> None:
        received.append(signal_number)
        for process in list(running):  # Ctrl-C, too, may save; a second signal ends them as it is
            process.send_signal(signal.SIGTERM if len(received) == 1 else signal_number)

    def train(recipe: Path, run_dir: Path, log: Path) -> None:
        if not received:
            command = [sys.executable, "-m", "mslt.cli.main", "train", str(recipe), "--run-dir", str(run_dir)]
            environment = environments.get()
            with open(log, "a") as file:
                process = subprocess.Popen(
                    [*command, "--workers", str(num_workers), *options],
                    stdout=file, stderr=file, env=environment, start_new_session=True,
                )  # fmt: skip
            running.append(process)
            if received:
                process.send_signal(signal.SIGTERM)
            process.wait()
            running.remove(process)
            environments.put(environment)
        if received:
            raise MsltError(f"{run_dir}: left at a signal; the same command goes on")

    previous = {number: signal.signal(number, pass_on) for number in (*SAVE_AND_LEAVE, *LEAVE)}
    try:
        yield train
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _visible_gpus(environment: dict[str, str]) -> list[str]:
    """Indices of the GPUs this process may use. DeepSpeed's launcher drops CUDA_VISIBLE_DEVICES when told how many
    workers to start, so it is told which GPUs instead, and the variable goes."""
    visible = environment.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    indices = [part.strip() for part in visible.split(",")]
    if not all(index.isdecimal() for index in indices):
        raise MsltError(f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's launcher takes indices only, such as 0,1")
    return indices


def _ranks(leader: int) -> list[psutil.Process]:
    """The runner's child is DeepSpeed's launcher of this machine, whose children are the ranks; theirs load data."""
    ranks = []
    with suppress(psutil.Error):
        for launcher in psutil.Process(leader).children():
            with suppress(psutil.Error):
                ranks += launcher.children()
    return ranks


def _ignore_what_is_for_the_ranks() -> None:
    """Inherited by DeepSpeed's processes, which have no handler for it; the ranks set their own."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _end_group(leader: int) -> None:
    """End what is left of the group: the launcher can be gone while its ranks live on."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(leader, number)
        except ProcessLookupError:
            return
        for _ in range(GRACE_S * 10):
            if not _group_lives(leader):
                return
            time.sleep(0.1)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
