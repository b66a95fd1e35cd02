"""The bare worker: one process of a run, started by the DeepSpeed launcher (or any that sets RANK and the rest)."""

import argparse
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path


def main() -> None:
    """Train what is not DONE of the plan in the run directory. Exit status 2 for a user's mistake or a full disk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", help="path or name of the recipe")
    parser.add_argument("--run-dir", type=Path, help="default: runs/NAME of the recipe")
    parser.add_argument("--shards", type=Path, help="shard folder, instead of the recipe's data.shards")
    for name in ("--time", "--micro-batches"):  # see _measure
        parser.add_argument(name, type=Path, nargs=2, metavar=("PLAN", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher adds it; LOCAL_RANK says the same
    options = parser.parse_args()

    from mslt.errors import MsltError
    from mslt.launcher import SAVE_AND_LEAVE

    told: list[int] = []
    measures = options.time or options.micro_batches
    for number in SAVE_AND_LEAVE:
        signal.signal(number, signal.SIG_DFL if measures else lambda received, _: told.append(received))
    rank = int(os.environ.get("RANK", "0"))
    try:
        if measures:
            plan, out = measures
            _measure(plan, out, options.shards, times=options.time is not None)
        else:
            _work(options.recipe, options.run_dir, options.shards, told)
    except (MsltError, OSError) as error:
        print(f"mslt: rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.stderr.flush()
        os._exit(2)  # other ranks may wait in a collective that this one will never join
    except KeyboardInterrupt:
        os._exit(130)  # whoever pressed Ctrl-C knows; a traceback from every rank says nothing more


def _work(recipe: str, run_dir: Path | None, shards: Path | None, told: list[int]) -> None:
    from mslt.engine.ds_config import zero_stage
    from mslt.engine.engine import quiet, start_workers
    from mslt.preflight import open_recipe
    from mslt.rundir import lock_run
    from mslt.train import train

    quiet()
    workers = start_workers()
    if workers.rank > 0:  # rank 0 makes the run directory, the others find it
        workers.barrier()
    opened = open_recipe(recipe, run_dir, shards, workers.size)
    if workers.rank == 0:
        workers.barrier()
    with lock_run(opened.run) if workers.rank == 0 else nullcontext():
        train(opened.plan, opened.run, opened.shards, opened.recipe.watch, workers, lambda: bool(told))
    if workers.rank == 0 and (stage_index := opened.run.first_unfinished(opened.plan)) is not None:
        for_zero = zero_stage(opened.plan.engine) == 3 and not told
        why = "ZeRO-3 takes a launch for every stage" if for_zero else "saved and left, as it was told"
        print(f"{opened.run.path}: {why}; start again for stage {stage_index + 1}", file=sys.stderr)


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
