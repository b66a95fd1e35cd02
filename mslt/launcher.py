"""Starting DeepSpeed's launcher on this machine, and ending it: none of its processes outlives the call.

It is the one that starts the ranks of a machine, deepspeed.launcher.launch. The `deepspeed` command above it adds what
is done elsewhere here (mslt.nodes, mslt.meeting), and hides from it that the ranks are orphaned: it ends with status 0.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import psutil
import torch

from mslt.cost import for_timing
from mslt.engine.ds_config import zero_stage
from mslt.errors import Left, MsltError
from mslt.nodes import Place, alone
from mslt.orphans import LAUNCHED, end_with
from mslt.plan import Plan, with_micro_batches

GRACE_S = 10  # between asking the group to end and ending it
LEAVE_S = 240  # between asking the workers to save and leave, and ending the group
SAVE_AND_LEAVE = (signal.SIGTERM, signal.SIGUSR1)  # SLURM warns with the second, and ends a job with the first
LEAVE = (signal.SIGINT, signal.SIGHUP)
ELSEWHERE = 126  # the status where workers of another host have ended first
SIGNALLED = 128  # and the signal's number: the status of a launcher that was ended by one


def num_workers_here(asked: int | None) -> int:
    """The workers asked for, by default one a GPU, or one. MsltError when they are more than the GPUs there are."""
    gpus = torch.cuda.device_count()
    if asked is not None and gpus and asked > gpus:
        raise MsltError(f"--workers {asked}: this machine shows {gpus} GPUs; each worker needs one of its own")
    return asked or max(gpus, 1)


def launch(
    arguments: list[str], place: Place, leave: Path | None = None, ended: Callable[[], bool] = lambda: False
) -> int:
    """Start this machine's workers (mslt.cli.worker with `arguments`) through DeepSpeed's launcher, wait, and return
    its exit status. They find those of other hosts on the first.

    At a signal of SAVE_AND_LEAVE, or when the file `leave` appears, the ranks alone are told, by SIGUSR1, and have
    LEAVE_S to go: on SIGTERM DeepSpeed's launcher ends them, and torch's loader processes end themselves. The same
    signal again, and those of LEAVE, go to the whole process group. The first signal is the status then, negative.
    Where workers of another host have `ended`, these get GRACE_S, too.
    """
    environment = {**os.environ, LAUNCHED: "1"}
    devices = {name: [str(index) for index in range(place.slots)] for name in place.names}
    if torch.cuda.is_available():
        devices[place.names[place.node_rank]] = _visible_gpus(environment)[: place.slots]
    elif not torch.accelerator.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // place.slots, 1)))
    if len(devices[place.names[place.node_rank]]) != place.slots:
        raise MsltError(f"this machine shows fewer GPUs than the {place.slots} workers it is to have; see nvidia-smi")
    if (interface := place.interface) is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.launch", "--log_level", "error"),
        *("--world_info", base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()),
        *("--node_rank", str(place.node_rank), "--master_addr", place.names[0], "--master_port", str(place.port)),
        *("--no_local_rank", "--module", "mslt.cli.worker"),
        *arguments,
    ]
    received: list[int] = []
    group: list[int] = []

    def stop(signal_number: int, _: FrameType | None = None) -> None:
        received.append(signal_number)
        for leader in group:
            is_first = signal_number in SAVE_AND_LEAVE and received.count(signal_number) == 1
            ranks = _ranks(leader) if is_first else []
            for rank in ranks:
                with suppress(psutil.Error):
                    rank.send_signal(signal.SIGUSR1)
            if not ranks:  # DeepSpeed's launcher, which has none yet, heeds no SIGUSR1
                with suppress(ProcessLookupError):
                    os.killpg(leader, signal.SIGTERM if is_first else signal_number)

    previous = {number: signal.signal(number, stop) for number in (*SAVE_AND_LEAVE, *LEAVE)}
    try:
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=partial(_before_the_launcher, os.getpid())
        )
        group.append(process.pid)
        if received:
            stop(received[0])
        status = None
        while status is None and not received:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=1)
            if leave is not None and leave.exists():
                stop(signal.SIGTERM)
            elif status is None and ended():
                with suppress(subprocess.TimeoutExpired):
                    status = process.wait(timeout=GRACE_S)
                status = ELSEWHERE if status is None else status  # ended by itself meanwhile, it may have ended well
        deadline = time.monotonic() + LEAVE_S
        while received and _group_lives(process.pid) and time.monotonic() < deadline:
            process.poll()  # a child that is not waited for keeps its group alive
            time.sleep(0.1)
        if received:
            return -received[0]
        return SIGNALLED - status if status is not None and status < 0 else int(status or 0)
    finally:
        for leader in group:
            _end_group(leader)
        for number, handler in previous.items():
            signal.signal(number, handler)


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
        status = launch([option, str(plan_file), str(out), "--shards", str(shards)], alone(num_workers))
        if -status in SAVE_AND_LEAVE:
            raise Left("timing steps: left at a signal; the same command times them again")
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
    """The children of DeepSpeed's launcher; theirs load data."""
    with suppress(psutil.Error):
        return psutil.Process(leader).children()
    return []


def _before_the_launcher(parent: int) -> None:
    """It does not outlive this process, which nothing would end then; and it inherits that SIGUSR1, which is for the
    ranks, is blocked: they are given it when they have a handler."""
    end_with(parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


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
