"""From a recipe to a running job: checked once by the parent, opened the same way by every worker.

The parent starts DeepSpeed's launcher in a session of its own, passes signals on to the whole group, and judges the
run by its DONE markers: the launcher's exit status can be 0 with dead or orphaned ranks.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import yaml

from mslt.config import Recipe, load_recipe
from mslt.data.manifest import Manifest, read_manifest
from mslt.data.order import SampleOrder
from mslt.data.shards import open_shards
from mslt.engine.ds_config import read_engine_config
from mslt.errors import MsltError
from mslt.plan import Plan, micro_batch_size
from mslt.provenance import provenance
from mslt.rundir import RunDir, open_run
from mslt.schedule import make_plan

GRACE_S = 10  # between asking the group to end and ending it


@dataclass(frozen=True)
class Opened:
    recipe: Recipe
    plan: Plan
    run: RunDir
    shards: Path


def open_recipe(name_or_path: str, run_dir: Path | None, shards: Path | None, num_workers: int) -> Opened:
    """Read the recipe, check it against its shards, and start or continue its run directory.

    `run_dir` defaults to runs/NAME, `shards` to the recipe's data.shards. MsltError, before anything is written, for
    every mistake that can be seen without training.
    """
    recipe = load_recipe(name_or_path)
    engine = read_engine_config(recipe.engine)
    folder = shards or Path(recipe.data.shards)
    manifest = read_manifest(folder)
    plan = make_plan(recipe, engine, manifest.hash)
    _check_shards(recipe, folder, manifest)
    for stage in plan.stages:
        micro_batch_size(stage, num_workers)
    run_path = run_dir or Path("runs") / Path(name_or_path).stem
    recipe_text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    return Opened(recipe, plan, open_run(run_path, plan, recipe_text, provenance()), folder)


def _check_shards(recipe: Recipe, folder: Path, manifest: Manifest) -> None:
    vocab_size, batch_size = manifest.tokenizer.vocab_size, recipe.training.batch_size
    if vocab_size > recipe.model.vocab_size:
        raise MsltError(
            f"{folder}: made with a tokenizer of {vocab_size} entries, model.vocab_size is {recipe.model.vocab_size}; "
            f"set model.vocab_size to at least {vocab_size}, or prepare shards with the model's tokenizer"
        )
    open_shards(folder, "validation")
    shards = open_shards(folder, "train")
    if shards.num_documents < batch_size:  # every document makes at least one sample
        data = recipe.data
        order = SampleOrder(shards, data.sequence_length, data.short_sequence_probability, recipe.training.seed)
        samples = len(order.index(0).start)
        if samples < batch_size:
            raise MsltError(
                f"{folder}: an epoch has {samples} samples, fewer than one batch of training.batch_size {batch_size}; "
                "prepare more text or lower the batch size"
            )


def default_workers() -> int:
    """One a GPU of this machine, or one."""
    return max(torch.cuda.device_count(), 1)


def launch(recipe: str, run_dir: Path, shards: Path, num_workers: int) -> int:
    """Start the workers on this machine through DeepSpeed's launcher, wait, and return its exit status.

    SIGINT and SIGTERM go on to the whole process group, and are the status then, negative. None of the group outlives
    this call.
    """
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"),
        *("--num_gpus", str(num_workers), "--master_addr", "127.0.0.1", "--master_port", str(_free_port())),
        *("--no_local_rank", "--module", "mslt.cli.worker"),
        *(recipe, "--run-dir", str(run_dir), "--shards", str(shards)),
    ]
    environment = dict(os.environ)
    if not torch.accelerator.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // num_workers, 1)))
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    received: list[int] = []

    def stop(signal_number: int, _: FrameType | None) -> None:
        received.append(signal_number)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
        return -received[0] if received else status
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end_group(process)


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End what is left of the group: the launcher can be gone while its ranks live on."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        for _ in range(GRACE_S * 10):
            if not _group_lives(process.pid):
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
