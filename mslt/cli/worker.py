"""The bare worker: one process of a run, started by the DeepSpeed launcher (or any that sets RANK and the rest)."""

import argparse
import os
import signal
from contextlib import nullcontext
from logging import DEBUG, ERROR
from pathlib import Path

from mslt.orphans import LAUNCHED, end_with


def main() -> None:
    """Train what is not DONE of the plan in the run directory. Exit status 2 for a user's mistake or a full disk."""
    if LAUNCHED in os.environ:
        end_with(os.getpgrp())  # killed, it tells its ranks nothing: they would go on, and hold the GPUs
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", help="path or name of the recipe")
    parser.add_argument("--run-dir", type=Path, help="default: runs/NAME of the recipe")
    parser.add_argument("--shards", type=Path, help="shard folder, instead of the recipe's data.shards")
    parser.add_argument("--timeout-minutes", type=float, default=30.0, help="how long to wait for others; default: 30")
    for name in ("--time", "--micro-batches"):  # see _measure
        parser.add_argument(name, type=Path, nargs=2, metavar=("PLAN", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher adds it; LOCAL_RANK says the same
    options = parser.parse_args()

    from mslt.failures import in_words, kind_of
    from mslt.launcher import SAVE_AND_LEAVE
    from mslt.logs import LOG

    told: list[int] = []
    measures = options.time or options.micro_batches
    for number in SAVE_AND_LEAVE:
        signal.signal(number, signal.SIG_DFL if measures else lambda received, _: told.append(received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SAVE_AND_LEAVE)  # mslt.launcher blocks until here
    rank = int(os.environ.get("RANK", "0"))
    try:
        if measures:
            plan, out = measures
            _measure(plan, out, options.shards, times=options.time is not None)
        else:
            _work(options.recipe, options.run_dir, options.shards, told, 60 * options.timeout_minutes)
    except KeyboardInterrupt:
        os._exit(130)  # whoever pressed Ctrl-C knows; a traceback from every rank says nothing more
    except Exception as error:
        kind = kind_of(error)
        LOG.error(f"mslt: rank {rank}: {in_words(error)}")
        LOG.log(ERROR if rank == 0 and kind == "error" else DEBUG, "", exc_info=True)
        os._exit(2 if kind == "mistake" else 1)  # others may wait in a collective that this one will never join


def _work(recipe: str, run_dir: Path | None, shards: Path | None, told: list[int], timeout_s: float) -> None:
    from mslt.engine.engine import quiet, start_workers
    from mslt.failures import noting_failures
    from mslt.files import write_json
    from mslt.logs import LOG, open_log
    from mslt.preflight import open_recipe, run_path
    from mslt.rundir import RunDir, lock_run
    from mslt.train import train

    quiet()
    rank = int(os.environ.get("RANK", "0"))
    run = RunDir(run_path(recipe, run_dir))
    with noting_failures(run.logs, rank, timeout_s) as pulse:
        workers = start_workers(timeout_s + 60)  # the pulse says where it stood, and comes first
        if rank > 0:  # rank 0 makes the run directory, the others find it
            workers.barrier()
        opened = open_recipe(recipe, run_dir, shards, workers.size)
        open_log(run.logs, rank)
        if rank == 0:
            run.left.unlink(missing_ok=True)
            workers.barrier()
        with lock_run(run) if rank == 0 else nullcontext():
            leaves = train(opened.plan, run, opened.shards, opened.recipe.watch, workers, lambda: bool(told), pulse.at)
        if rank == 0 and (stage_index := run.first_unfinished(opened.plan)) is not None:
            why = "saved and left, as it was told" if leaves else "ZeRO-3 takes a launch for every stage"
            if leaves:
                write_json(run.left, {"stage": stage_index + 1, "port": int(os.environ["MASTER_PORT"])})
            LOG.info(f"{run.path}: {why}; start again for stage {stage_index + 1}")
        workers.barrier()  # whoever reads on another host what rank 0 has left finds it


def _measure(plan: Path, out: Path, shards: Path, times: bool) -> None:
    """Train nothing: write what the parts of a step of each stage of a plan take, or the fastest micro-batches."""
    import json

    from mslt import measure
    from mslt.engine.engine import quiet, start_workers
    from mslt.files import write_text
    from mslt.plan import Plan

    quiet()
    workers = start_workers()
    measured = measure.time_stages if times else measure.fastest_micro_batches
    found = measured(Plan.model_validate_json(plan.read_text()), shards, workers)
    if workers.rank == 0:
        write_text(out, json.dumps(found))


if __name__ == "__main__":
    main()
