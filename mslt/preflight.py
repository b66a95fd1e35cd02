"""From a recipe's name to a run directory: everything that can be seen to be wrong is said here, before it is made.

The parent process and every worker open a recipe the same way.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from mslt.config import Recipe, load_recipe
from mslt.data.manifest import SPLITS, Manifest, read_manifest
from mslt.data.order import SampleOrder
from mslt.data.shards import open_shards
from mslt.engine.ds_config import read_engine_config
from mslt.engine.gpus import check_gpus
from mslt.errors import MsltError
from mslt.plan import Plan, autocast_dtype, micro_batch_size, with_micro_batches
from mslt.provenance import provenance
from mslt.rundir import RunDir, open_run, read_plan
from mslt.schedule import make_plan

Measure = Callable[[Plan, Path, int], Plan]  # the plan with the fastest micro-batches for so many workers


@dataclass(frozen=True)
class Checked:
    recipe: Recipe
    plan: Plan
    shards: Path


@dataclass(frozen=True)
class Opened(Checked):
    run: RunDir


def check_recipe(name_or_path: str, shards: Path | None, num_workers: int) -> Checked:
    """Read the recipe and check it against its shards and this machine. `shards` defaults to the recipe's data.shards.
    MsltError for every mistake that can be seen without training."""
    recipe = load_recipe(name_or_path)
    engine = read_engine_config(recipe.engine)
    folder = shards or Path(recipe.data.shards)
    manifest = read_manifest(folder)
    plan = make_plan(recipe, engine, manifest.hash)
    check_gpus(autocast_dtype(engine), num_workers)
    _check_shards(recipe, folder, manifest)
    for stage in plan.stages:
        micro_batch_size(stage, num_workers)
    return Checked(recipe, plan, folder)


def open_recipe(
    name_or_path: str, run_dir: Path | None, shards: Path | None, num_workers: int, measure: Measure | None = None
) -> Opened:
    """Check the recipe, and start or continue its run directory, by default runs/NAME. Nothing is written before all
    is right.

    A micro-batch that is to be measured is what the run directory says; for a new one `measure` is asked, and MsltError
    raised without it.
    """
    checked = check_recipe(name_or_path, shards, num_workers)
    path = run_path(name_or_path, run_dir)
    recipe_text = yaml.safe_dump(checked.recipe.model_dump(mode="json"), sort_keys=False)
    plan, is_new = checked.plan, not RunDir(path).plan.exists()
    if checked.recipe.training.micro_batch_size == "auto" and is_new:
        if measure is None:
            raise MsltError(
                "training.micro_batch_size auto: is measured by `mslt train`, which writes it into the run directory; "
                "start the run with that, or write a number"
            )
        plan = measure(plan, checked.shards, num_workers)
    run = open_run(path, plan, recipe_text, provenance())
    if checked.recipe.training.micro_batch_size == "auto":
        plan = with_micro_batches(plan, (stage.micro_batch_size for stage in read_plan(run).stages))
    return Opened(checked.recipe, plan, checked.shards, run)


def run_path(name_or_path: str, run_dir: Path | None) -> Path:
    """The run directory: by default runs/NAME."""
    return run_dir or Path("runs") / Path(name_or_path).stem


def wait_for_run(name_or_path: str, run_dir: Path | None, minutes: float) -> None:
    """Wait until another machine has made the run directory. MsltError where it does not appear."""
    plan, deadline = RunDir(run_path(name_or_path, run_dir)).plan, time.monotonic() + 60 * minutes
    while not plan.exists():
        if time.monotonic() > deadline:
            raise MsltError(
                f"{plan}: not there after {minutes:g} minutes; the first host makes it, in a folder that all share"
            )
        time.sleep(0.5)


def _check_shards(recipe: Recipe, folder: Path, manifest: Manifest) -> None:
    vocab_size, batch_size = manifest.tokenizer.vocab_size, recipe.training.batch_size
    if vocab_size > recipe.model.vocab_size:
        raise MsltError(
            f"{folder}: made with a tokenizer of {vocab_size} entries, model.vocab_size is {recipe.model.vocab_size}; "
            f"set model.vocab_size to at least {vocab_size}, or prepare shards with the model's tokenizer"
        )
    order = {
        split: SampleOrder(
            open_shards(folder, split),
            recipe.training.sequence_length,
            recipe.data.short_sequence_probability,
            recipe.training.seed,
            recipe.data.next_sentence_prediction,
        )
        for split in SPLITS
    }
    if order["train"].shards.num_documents < batch_size:  # every document makes at least one sample
        samples = order["train"].num_samples(0)
        if samples < batch_size:
            raise MsltError(
                f"{folder}: an epoch has {samples} samples, fewer than one batch of training.batch_size {batch_size}; "
                "prepare more text or lower the batch size"
            )
