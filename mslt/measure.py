"""What is measured before a run: what the parts of a step take, and the micro-batch that is fastest."""

import time
from pathlib import Path

import torch

from mslt.cost import PARTS
from mslt.data.loader import Batch, Samples, training_batches
from mslt.data.shards import Shards, open_shards
from mslt.engine.ds_config import reduced_bytes
from mslt.engine.engine import Engine, Workers
from mslt.errors import MsltError
from mslt.models import factory
from mslt.plan import Plan
from mslt.train import build_module, compilable

BLOCKS, BLOCK_STEPS, WARMUP_STEPS = 5, 2, 2
GAIN = 0.02  # of the time of a sample: what a larger micro-batch must save to be taken


def time_stages(plan: Plan, shards: Path, workers: Workers) -> list[dict[str, list[float]]]:
    """For each stage of the plan, seconds a step of PARTS, one for each of BLOCKS; `data` is loading without loader
    processes, and all that is left of a step. All ranks call this; nothing is kept.

    The stages take turns, so that what disturbs the machine disturbs all of them. They start from random weights and
    take steps at rate 0.
    """
    training, plan = open_shards(shards, "train"), compilable(plan, workers)
    runs = []
    for index, stage in enumerate(plan.stages):
        engine, samples = _started(plan, index, training, workers)
        batches = training_batches(samples, stage, workers.rank, workers.size, 0, num_workers=0)
        runs.append((engine, batches))
    upcoming = [next(batches) for _, batches in runs]
    num_steps = 0
    timed: list[dict[str, list[float]]] = [{part: [] for part in PARTS} for _ in runs]
    for block in range(BLOCKS + 1):
        steps = BLOCK_STEPS if block else WARMUP_STEPS
        for index, ((engine, batches), parts) in enumerate(zip(runs, timed, strict=True)):
            engine.clock.take()
            started = time.perf_counter()
            for step in range(num_steps, num_steps + steps):
                batch, upcoming[index] = upcoming[index], next(batches)
                engine.train_step(batch, step, 0.0, upcoming=upcoming[index])
            taken = engine.clock.take()  # waits for the device
            total = time.perf_counter() - started
            if block:
                computing = {part: taken.get(part, 0.0) for part in PARTS if part != "data"}
                for part, seconds in {**computing, "data": total - sum(computing.values())}.items():
                    parts[part].append(seconds / steps)
        num_steps += steps
    for engine, _ in runs:
        engine.close()
    return timed


def _started(plan: Plan, stage_index: int, training: Shards, workers: Workers) -> tuple[Engine, Samples]:
    """The stage from random weights, and its samples."""
    stage = plan.stages[stage_index]
    base = factory.initial_state(plan.model, stage.depth, seed=0)
    engine = Engine(build_module(plan, stage_index, base), plan, stage_index, workers)
    return engine, Samples(training, plan.data, stage.sequence_length, stage.seed)


def fastest_micro_batches(plan: Plan, shards: Path, workers: Workers) -> list[int]:
    """For each stage, the micro-batch with the fastest samples, forward and backward, among divisors of its batch that
    double from 1 on, until a GPU's memory ends or another saves less than GAIN. For one worker; nothing is kept.

    What is frozen keeps nothing for the backward pass, so that a larger one may fit there. MsltError where not even one
    sample does.
    """
    training, plan = open_shards(shards, "train"), compilable(plan, workers)
    found = []
    for index, stage in enumerate(plan.stages):
        engine, samples = _started(plan, index, training, workers)
        # What only a run of several workers holds: gradients as they travel.
        travelling = torch.empty(sum(engine.sizes.values()) * reduced_bytes(plan.engine) // 4, device=workers.device)
        best, best_s = 0, float("inf")
        for size in _doubling_divisors(stage.batch_size):
            engine.micro_batch_size = size
            try:  # two of them, if they make up a share: the second finds gradients in memory
                sample_s = _sample_seconds(engine, samples.batch(range(min(2 * size, stage.batch_size))))
            except torch.OutOfMemoryError:
                break
            if sample_s > (1 - GAIN) * best_s:
                break
            best, best_s = size, sample_s
        engine.close()
        del travelling
        if workers.device.type == "cuda":
            torch.cuda.empty_cache()
        if not best:
            raise MsltError(
                f"stage {index + 1}: not even one sample of {stage.sequence_length} tokens fits into the memory of "
                f"{workers.device}; take a smaller model or shorter sequences"
            )
        found.append(best)
    return found


def _doubling_divisors(number: int) -> list[int]:
    """Divisors from 1 up, each at least twice the one before."""
    found = [1]
    for size in range(2, number + 1):
        if number % size == 0 and size >= 2 * found[-1]:
            found.append(size)
    return found


def _sample_seconds(engine: Engine, batch: Batch) -> float:
    """Seconds of a sample in the forward and backward passes of a step: the better of two, after one."""
    seconds = []
    for step in range(3):
        engine.clock.take()
        engine.train_step(batch, step, 0.0, upcoming=batch)
        taken = engine.clock.take()  # waits for the device
        seconds.append((taken["forward"] + taken["backward"]) / len(batch["input_ids"]))
    return min(seconds[1:])
