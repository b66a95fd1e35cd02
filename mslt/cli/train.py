"""`mslt train`: the parent process of a run."""

import os
import signal
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

LEAVE_S = 20.0  # for this process to end, with no workers running


def train(
    recipe: Annotated[str, typer.Argument(help="Path of a recipe (*.yaml), or the name of one shipped with mslt.")],
    run_dir: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/NAME.", show_default=False)] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Shard folder, instead of the recipe's data.shards.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine. Default: one a GPU, or one.", show_default=False),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="How often to start again from the last checkpoint where the run fails.")
    ] = 0,
    timeout_minutes: Annotated[
        float, typer.Option(min=0.1, help="How long a worker may wait for the others before it gives up.")
    ] = 30.0,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="Machines to train on, a line `NAME slots=WORKERS` for each.", show_default=False),
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(
            min=0, help="This machine's line in the hostfile, from 0. Default: start all.", show_default=False
        ),
    ] = None,
    master_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the first host on which all meet.")
    ] = 29500,
    min_nodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Go on with so many machines at least where others do not come back, in the same steps. Default: all.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a recipe, or go on where it stopped: the same command again continues. SIGTERM and SIGUSR1 make it save and
    leave."""
    from mslt.errors import Left, MsltError
    from mslt.failures import forget_failures
    from mslt.files import wait_until_seen
    from mslt.launcher import SAVE_AND_LEAVE, launch, num_workers_here, with_fastest_micro_batches
    from mslt.meeting import Meeting
    from mslt.nodes import Place, alone, everywhere, on_every_host, read_hostfile
    from mslt.orphans import leave_with_the_listener
    from mslt.preflight import check_recipe, open_recipe, run_path, wait_for_run
    from mslt.rundir import RunDir, lock_run, read_summaries
    from mslt.supervisor import train_to_the_end

    if hostfile is None and node_rank is not None:
        raise MsltError(f"--node-rank {node_rank}: names a line of a hostfile; give --hostfile, too")
    if hostfile is not None and workers is not None:
        raise MsltError(f"--workers {workers}: the slots in {hostfile} say how many; leave one of the two out")
    hosts = None if hostfile is None else read_hostfile(hostfile)
    if hosts is None and min_nodes is not None:
        raise MsltError(f"--min-nodes {min_nodes}: is for runs on several hosts; give --hostfile, too")
    if hosts is not None and node_rank is None:
        raise typer.Exit(on_every_host(everywhere(hosts, sys.argv[1:]), RunDir(run_path(recipe, run_dir)).leave))

    left = Left(f"{run_path(recipe, run_dir)}: left, with no workers running; the same command goes on")

    meeting: Meeting | None = None
    line = f"mslt: {left}\n".encode(errors="backslashreplace")  # a path may hold any bytes

    def leave_at_once() -> None:
        with suppress(OSError):  # the terminal may be what has gone
            os.write(2, line)  # where the signal came inside a print, another would raise
        os._exit(left.exit_status)

    def leave(_number: int, _: FrameType | None) -> None:
        if meeting is None:  # no other host to tell; what is raised here an import might turn into an error of its own
            leave_at_once()
        latest = threading.Timer(LEAVE_S, leave_at_once)  # where what is raised here is swallowed
        latest.daemon = True
        latest.start()
        raise left

    for number in SAVE_AND_LEAVE:  # while they run, `launch` has handlers of its own
        signal.signal(number, leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SAVE_AND_LEAVE)
    if hosts is not None:
        leave_with_the_listener()
    num_here = num_workers_here(workers if hosts is None else hosts.slots)
    num_workers = num_here if hosts is None else hosts.num_workers
    is_first = not node_rank
    if not is_first:
        check_recipe(recipe, shards, num_workers)  # on the first host such a mistake ends the run before it is made
        wait_for_run(recipe, run_dir, timeout_minutes)
    opened = open_recipe(recipe, run_dir, shards, num_workers, with_fastest_micro_batches)
    plan, run = opened.plan, opened.run
    run.logs.mkdir(exist_ok=True)
    if is_first:
        for mark in (run.leave, run.left):
            mark.unlink(missing_ok=True)
    arguments = [recipe, "--run-dir", str(run.path), "--shards", str(opened.shards)]
    arguments += ["--timeout-minutes", str(timeout_minutes)]

    if hosts is not None:
        meeting = Meeting(hosts, node_rank or 0, master_port, min_nodes or len(hosts.names), timeout_minutes, plan, run)

    def start(place: Place) -> int:
        forget_failures(run.logs, place.ranks)
        if is_first:
            with lock_run(run):  # taken by the workers in a moment: here it only says so early where it is held
                pass
        if meeting is None:
            return launch(arguments, place, run.leave)
        unfinished = run.first_unfinished(plan)
        try:
            status = launch(arguments, place, run.leave if is_first else None, meeting.has_ended)
        finally:
            meeting.tell_end()
        if not is_first and status == 0:
            wait_until_seen(lambda: run.first_unfinished(plan) != unfinished or run.was_left(place.port))
        return status

    try:
        train_to_the_end(run, plan, partial(alone, num_here) if meeting is None else meeting.place, start, restarts)
    finally:
        if meeting is not None:
            meeting.close()
    if not is_first:
        return
    last = read_summaries(run)[-1]["evaluation_after"]
    losses = f"MLM loss {last['mlm_loss']:.4f}" + (f", NSP {last['nsp_loss']:.4f}" if "nsp_loss" in last else "")
    print(
        f"{run.path}: all {len(plan.stages)} stages done, held-out {losses}; "
        f"model in {run.stage(len(plan.stages) - 1).model}",
        file=sys.stderr,
    )
