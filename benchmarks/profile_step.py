"""Which operations does a step spend its time in?

    python -m benchmarks.profile_step [--layers 12 --width 256 --vocabulary 8192 --sequence-length 128 --batch 16]
                                      [--dtype fp32|bf16] [--compile none|frozen|all] [--top 15] [--trace FOLDER]
                                      [--record FILE]

One worker; a step of full training and one of the third of four growing stages, after three others, under torch's
profiler. Times are each operation's own, on the thread that calls it (on CUDA of its kernels); forward, backward and
the optimizer take turns, so that their sum is about the step. `--trace` also keeps what Perfetto and chrome://tracing
show.
"""

import argparse
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import SCHEDULES, add_size_options, plan_of, size_of
from benchmarks.record import hardware, heading, shape, table, this_command, write_record
from benchmarks.vs_peers import STEPS, engine_step, made_share, started, synchronize
from benchmarks.workers import spawn
from mslt.engine.engine import Workers
from mslt.provenance import provenance

WARMUP_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, batch=16)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", choices=("none", "frozen", "all"), default="none")
    parser.add_argument("--top", type=int, default=15, help="operations to show")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    engine, size = f"zero0_{options.dtype}", size_of(options)
    plans = {
        name: plan_of(size, SCHEDULES[name], engine).model_copy(update={"compile": options.compile})
        for name, _ in STEPS.values()
    }
    found = spawn(work, 1, plans, options)
    lines = [f"{shape(plans['full'], 1)} Compiled layers: {options.compile}."]
    for title, operations in found.items():
        total_s = sum(seconds for _, seconds, _ in operations)
        rows = [
            [name, f"{calls:,}", f"{1000 * seconds:.1f}", f"{seconds / total_s:.1%}"]
            for name, seconds, calls in operations[: options.top]
        ]
        lines += ["", f"## {title}: {1000 * total_s:.0f} ms", "", *table(["operation", "calls", "ms", "share"], rows)]
    head = heading("Where a step spends its time", this_command(), provenance(), hardware())
    write_record(options.record, [*head, *lines])


def work(
    workers: Workers, plans: dict[str, Any], options: argparse.Namespace
) -> dict[str, list[tuple[str, float, int]]]:
    """For each step the operations with their own seconds and calls, the longest first."""
    batch = made_share(size_of(options), workers)
    on_cuda = workers.device.type == "cuda"
    found = {}
    for title, (schedule, stage_index) in STEPS.items():
        engine = started(plans[schedule], stage_index, workers)
        step = engine_step(engine, batch)
        for _ in range(WARMUP_STEPS):
            step()
        synchronize(workers.device)
        with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiled:
            step()
            synchronize(workers.device)
        engine.close()
        if options.trace is not None:
            options.trace.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(str(options.trace / f"{schedule}-{stage_index + 1}.json"))
        timed = []
        for event in profiled.key_averages():
            if event.is_user_annotation:  # a span, whose kernels are there too
                continue
            own_us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            timed.append((event.key, own_us / 1e6, event.count))
        found[title] = sorted(timed, key=lambda operation: -operation[1])
    return found


if __name__ == "__main__":
    main()
