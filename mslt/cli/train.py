"""`mslt train`: the parent process of a run."""

import sys
from pathlib import Path
from typing import Annotated

import typer


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
) -> None:
    """Train a recipe, or go on where it stopped: the same command again continues. SIGTERM and SIGUSR1 make it save and
    leave."""
    from mslt.errors import MsltError
    from mslt.launcher import SAVE_AND_LEAVE, launch, num_workers_here, with_fastest_micro_batches
    from mslt.preflight import open_recipe
    from mslt.rundir import lock_run, read_summaries

    num_workers = num_workers_here(workers)
    opened = open_recipe(recipe, run_dir, shards, num_workers, with_fastest_micro_batches)
    plan, run = opened.plan, opened.run
    while (unfinished := run.first_unfinished(plan)) is not None:
        with lock_run(run):  # taken by the workers in a moment: here it only says so early where it is held
            pass
        arguments = [recipe, "--run-dir", str(run.path), "--shards", str(opened.shards)]
        status = launch(arguments, num_workers)
        reached = run.first_unfinished(plan)
        if reached is not None and -status in SAVE_AND_LEAVE:
            raise MsltError(f"{run.path}: left in stage {reached + 1} of {len(plan.stages)}; the same command goes on")
        if reached is not None and (status != 0 or reached == unfinished):
            raise MsltError(
                f"{run.path}: stopped in stage {reached + 1} of {len(plan.stages)} (launcher's status {status}, the "
                "reason stands above); the same command again goes on from the last checkpoint"
            )
    last = read_summaries(run)[-1]["evaluation_after"]
    losses = f"MLM loss {last['mlm_loss']:.4f}" + (f", NSP {last['nsp_loss']:.4f}" if "nsp_loss" in last else "")
    print(
        f"{run.path}: all {len(plan.stages)} stages done, held-out {losses}; "
        f"model in {run.stage(len(plan.stages) - 1).model}",
        file=sys.stderr,
    )
