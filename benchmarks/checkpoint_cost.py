"""What saving costs the step loop, for the whole of BERT-Base: the most a checkpoint ever holds.

    python -m benchmarks.checkpoint_cost OUT [--repeats 5] [--record FILE]

A round is some steps without a save, then a save and as many steps beside its writing, on one worker. The cost of a
save is the time the loop stands still for the copy, plus what the steps beside the writing take longer.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.record import hardware, heading, table, this_command, write_record
from mslt.config import load_recipe
from mslt.data.loader import Batch
from mslt.engine.checkpoint import Writer
from mslt.engine.ds_config import read_engine_config
from mslt.engine.engine import Engine, quiet, start_workers
from mslt.models import factory
from mslt.plan import Plan, Stage
from mslt.provenance import provenance
from mslt.schedule import make_plan
from mslt.train import build_module

STEPS_BETWEEN_SAVES = 500
STEPS_A_ROUND = 4
BATCH_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    plan = bert_base()
    stage = plan.stages[0]
    alone()
    quiet()
    workers = start_workers()
    writer = Writer(workers.rank)
    base = factory.initial_state(plan.model, stage.depth, seed=0)
    engine = Engine(build_module(plan, 0, base), plan, 0, workers)
    batch = made_batch(plan, stage)
    rounds = []
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        seconds(engine, batch, 1)
        for number in range(1, options.repeats + 1):
            plain = seconds(engine, batch, STEPS_A_ROUND)
            started = time.perf_counter()
            tensors, numbers = engine.save()
            writer.write(Path(folder), number, tensors, {"engine": numbers})
            stall = time.perf_counter() - started
            beside = seconds(engine, batch, STEPS_A_ROUND)
            waiting = time.perf_counter()
            writer.wait()
            rounds.append((plain / STEPS_A_ROUND, stall, beside - plain, time.perf_counter() - waiting))
            del tensors
        written = sum(file.stat().st_size for file in Path(folder).glob("step-*[0-9]/*.safetensors")) / 2
    step, stall, longer, waited = (statistics.median(values) for values in zip(*rounds, strict=True))
    share = (stall + max(longer, 0.0)) / (STEPS_BETWEEN_SAVES * step)
    rows = [
        [f"a step of {BATCH_SIZE} samples, s", f"{step:.2f}", spread([r[0] for r in rounds])],
        ["the loop stands still for the copy, s", f"{stall:.2f}", spread([r[1] for r in rounds])],
        [
            f"{STEPS_A_ROUND} steps beside the writing take longer by, s",
            f"{longer:.2f}",
            spread([r[2] for r in rounds]),
        ],
        ["writing goes on after them for, s", f"{waited:.2f}", spread([r[3] for r in rounds])],
        ["a checkpoint, MB", f"{written / 1e6:.1f}", ""],
        [f"cost at a save every {STEPS_BETWEEN_SAVES} steps (allowed 2 %)", f"{share:.3%}", ""],
    ]
    head = heading("What saving BERT-Base costs the step loop", this_command(), provenance(), hardware())
    write_record(options.record, [*head, *table(["", "median", "lowest to highest"], rows)])
    engine.close()


def bert_base() -> Plan:
    recipe = load_recipe("bert-base-full")
    training = recipe.training.model_copy(update={"batch_size": BATCH_SIZE, "micro_batch_size": BATCH_SIZE})
    return make_plan(recipe.model_copy(update={"training": training}), read_engine_config("zero0_bf16"))


def made_batch(plan: Plan, stage: Stage) -> Batch:
    shape, generator = (stage.batch_size, stage.sequence_length), torch.Generator().manual_seed(0)
    ids = torch.randint(plan.model.vocab_size, shape, generator=generator)
    masked = (stage.batch_size, plan.data.max_predictions)
    return {
        "input_ids": ids,
        "token_type_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "mlm_positions": torch.randint(stage.sequence_length, masked, generator=generator),
        "mlm_labels": torch.randint(plan.model.vocab_size, masked, generator=generator),
        "nsp_labels": torch.zeros(stage.batch_size, dtype=torch.long),
    }


def seconds(engine: Engine, batch: Batch, steps: int) -> float:
    started = time.perf_counter()
    for step in range(steps):
        engine.train_step(batch, step, 1e-4)
    if engine.workers.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def alone() -> None:
    """This process as the only worker, where no launcher says otherwise."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29681")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


if __name__ == "__main__":
    main()
