"""How much of the reduction hides behind computing?

    python -m benchmarks.overlap [--layers 12 --width 256 --vocabulary 8192 --sequence-length 128 --batch 16]
                                 [--workers 2] [--dtype fp32|bf16] [--rounds 5] [--record FILE]

A step of full training and one of the third of four growing stages, each in two ways that take turns: as mslt does it
(gradients travel in buckets while the backward pass runs, and what is frozen begins on the next batch while the last of
them are under way), and one after the other (all gradients in one bucket after the backward pass, then the frozen part
of the next step). ZeRO-0. On one machine a slow network is a namespace of its own:

    ip netns add slow && ip -n slow link set lo up
    tc -n slow qdisc add dev lo root tbf rate 1gbit burst 1mb latency 1s
    ip netns exec slow env GLOO_SOCKET_IFNAME=lo python -m benchmarks.overlap …
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import SCHEDULES, add_size_options, plan_of, size_of
from benchmarks.record import hardware, heading, shape, table, this_command, write_record
from benchmarks.vs_peers import RATE, STEPS, made_share, started, synchronize
from benchmarks.workers import spawn
from mslt.data.loader import Batch
from mslt.engine.ds_config import reduced_bytes
from mslt.engine.engine import Engine, Workers
from mslt.plan import Plan
from mslt.provenance import provenance

OVERLAPPED, IN_TURN = "beside computing", "one after the other"
ONE_BUCKET = 10**12  # elements
LINK_BYTES, LINK_TRIES = 2**25, 3
WARMUP_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, batch=16)
    parser.add_argument("--workers", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    if options.workers < 2 or options.batch % options.workers:
        parser.error(f"--workers {options.workers}: two at least, among whom the {options.batch} samples are shared")
    size = size_of(options)
    plans = {title: plan_of(size, SCHEDULES[name], f"zero0_{options.dtype}") for title, (name, _) in STEPS.items()}
    found = spawn(work, options.workers, plans, options)
    rows = []
    for title, turns in found["turns"].items():
        for way, taken in turns.items():
            step_s, waiting_s = ([turn[part] for turn in taken] for part in ("step", "waiting"))
            faster = statistics.median(
                slow["step"] / own["step"] for slow, own in zip(turns[IN_TURN], taken, strict=True)
            )
            rows.append([
                title, way, f"{found['bytes'][title] / 1e6:.0f}", f"{1000 * statistics.median(step_s):.0f}",
                f"{1000 * min(step_s):.0f} to {1000 * max(step_s):.0f}", f"{1000 * statistics.median(waiting_s):.0f}",
                f"{faster:.2f}",
            ])  # fmt: skip
    columns = ["", "gradients travel", "MB", "a step, ms", "lowest to highest", "of it waiting, ms", "speed"]
    link = f"An all-reduce of {LINK_BYTES / 1e6:.0f} MB goes at {found['link_bytes_per_s'] / 1e6:.0f} MB/s."
    note = f"{shape(next(iter(plans.values())), options.workers)} {link} Medians of {options.rounds} rounds."
    head = heading("Reduction beside computing", this_command(), provenance(), hardware())
    write_record(options.record, [*head, note, "", *table(columns, rows)])


def work(workers: Workers, plans: dict[str, Plan], options: argparse.Namespace) -> dict[str, Any]:
    """One worker; returns what was measured."""
    batch = made_share(size_of(options), workers)
    turns: dict[str, dict[str, list[dict[str, float]]]] = {}
    reduced = {}
    for title, (_, stage_index) in STEPS.items():
        plan = plans[title]
        zero = {**plan.engine["zero_optimization"], "reduce_bucket_size": ONE_BUCKET}
        in_one = plan.model_copy(update={"engine": {**plan.engine, "zero_optimization": zero}})
        engines = {OVERLAPPED: started(plan, stage_index, workers), IN_TURN: started(in_one, stage_index, workers)}
        turns[title] = {way: [] for way in engines}
        for round_ in range(WARMUP_STEPS + options.rounds):
            for way, engine in engines.items():
                upcoming = batch if way == OVERLAPPED else None
                found = measured(engine, batch, round_, upcoming, workers)
                if round_ >= WARMUP_STEPS:
                    turns[title][way].append(found)
        reduced[title] = sum(engines[OVERLAPPED].sizes.values()) * reduced_bytes(plan.engine)
        for engine in engines.values():
            engine.close()
    return {"turns": turns, "bytes": reduced, "link_bytes_per_s": link_bytes_per_s(workers)}


def measured(engine: Engine, batch: Batch, step: int, upcoming: Batch | None, workers: Workers) -> dict[str, float]:
    """Seconds of the slowest worker: of the step, and of what it waits for gradients in it."""
    workers.barrier()
    engine.clock.take()
    synchronize(workers.device)
    began = time.perf_counter()
    engine.train_step(batch, step, RATE, upcoming=upcoming)
    synchronize(workers.device)
    spent = time.perf_counter() - began
    told = workers.gather((spent, engine.clock.take()["reduce"]))
    return {"step": max(step_s for step_s, _ in told), "waiting": max(waiting_s for _, waiting_s in told)}


def link_bytes_per_s(workers: Workers) -> float:
    tensor = torch.zeros(LINK_BYTES // 4, device=workers.device)
    seconds = []
    for _ in range(LINK_TRIES):
        workers.barrier()
        synchronize(workers.device)
        began = time.perf_counter()
        workers.sum(tensor)
        synchronize(workers.device)
        seconds.append(time.perf_counter() - began)
    return LINK_BYTES / min(seconds)


if __name__ == "__main__":
    main()
