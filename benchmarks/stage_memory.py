"""Memory over stages in one process, for each ZeRO stage that allows it; checkpoint sizes beside the formula.

    python -m benchmarks.stage_memory OUT [--record FILE]

Five times the same stage (4 layers × 256, all trained) is built, trained for three steps and closed, on one worker;
what an old engine keeps would show as memory that grows. Then a checkpoint of every stage of `bert-base` is written.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch

from benchmarks.checkpoint_cost import alone, made_batch
from benchmarks.record import hardware, heading, table, this_command, write_record
from mslt.config import load_recipe
from mslt.cost import stage_cost
from mslt.engine import checkpoint
from mslt.engine.ds_config import read_engine_config
from mslt.engine.engine import Engine, Workers, quiet, start_workers
from mslt.models import factory
from mslt.plan import Plan
from mslt.provenance import provenance
from mslt.schedule import make_plan
from mslt.train import build_module

ROUNDS = 5
ZERO_STAGES = (0, 1, 2)
MOMENTS_AND_WEIGHT_BYTES = 12  # three fp32 numbers a trainable parameter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(rounds(options.one)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for zero in ZERO_STAGES:
        command = [sys.executable, "-m", "benchmarks.stage_memory", str(options.out), "--one", str(zero)]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        for what, values in json.loads(lines[-1]).items():
            rows.append([f"ZeRO-{zero}, {what}", *(f"{value:.1f}" for value in values)])
    sizes = checkpoint_sizes(options.out)
    head = heading("Memory over stages, and checkpoint sizes", this_command(), provenance(), hardware())
    lines = [
        *head, "## After a stage is closed", "", *table(["", *(f"round {n}" for n in range(1, ROUNDS + 1))], rows), "",
        "## A checkpoint of each stage of bert-base", "",
        *table(["stage", "trainable parameters", "× 12 bytes, MB", "written, MB", "over the formula"], sizes),
    ]  # fmt: skip
    write_record(options.record, lines)


def rounds(zero: int) -> dict[str, list[float]]:
    """After each round: tensors that are still alive, and the resident set, MB."""
    plan = shaped("quickstart-full", f"zero{zero}_fp32", num_hidden_layers=4, hidden_size=256)
    alone()
    quiet()
    workers = start_workers()
    base = factory.initial_state(plan.model, plan.stages[0].depth, seed=0)
    alive, resident = [], []
    for _ in range(ROUNDS):
        train_and_close(plan, workers, base)
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        alive.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6)
        resident.append(psutil.Process().memory_info().rss / 1e6)
    return {"living tensors, MB": alive, "resident set, MB": resident}


def train_and_close(plan: Plan, workers: Workers, base: dict[str, torch.Tensor]) -> None:
    engine = Engine(build_module(plan, 0, base), plan, 0, workers)
    for step in range(3):
        engine.train_step(made_batch(plan, plan.stages[0]), step, 1e-3)
    engine.close()


def checkpoint_sizes(out: Path) -> list[list[str]]:
    plan = shaped("bert-base", "zero0_fp32")
    alone()
    quiet()
    workers = start_workers()
    rows = []
    for index, stage in enumerate(plan.stages):
        base = factory.initial_state(plan.model, stage.depth, seed=0)
        engine = Engine(build_module(plan, index, base), plan, index, workers)
        tensors, _ = engine.save()
        with tempfile.TemporaryDirectory(dir=out) as folder:
            checkpoint.commit(Path(folder), 1, tensors, {})
            written = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        trained = stage_cost(plan.model, stage).trainable_parameters
        expected = trained * MOMENTS_AND_WEIGHT_BYTES
        over = f"{written - expected:,} bytes"
        rows.append([str(index + 1), f"{trained:,}", f"{expected / 1e6:.2f}", f"{written / 1e6:.2f}", over])
        engine.close()
    return rows


def shaped(name: str, engine: str, **model: int) -> Plan:
    recipe = load_recipe(name)
    return make_plan(
        recipe.model_copy(update={"model": recipe.model.model_copy(update=model)}), read_engine_config(engine)
    )


if __name__ == "__main__":
    main()
