"""A run killed at random moments, again and again: has it the weights of an undisturbed one, bit for bit?

    python -m benchmarks.kill_and_resume OUT [--kills 200] [--seed 0] [--workers 2] [--engine zero0_fp32]
                                             [--record FILE]

OUT gets shards of Python's own docs and a folder of this engine, number of workers and seed. A run is started, killed
with SIGKILL (one rank or all of them) and started again in its directory until it is done; then what it leaves is
compared with the undisturbed run, and the next one begins, until all kills are spent. CPU, fp32, dropout on.

To make hundreds of starts affordable, torch, DeepSpeed and mslt are imported once, and every rank is a fork that runs
the worker's own `main`. What a launcher adds (imports, its own processes, another hash seed for each) is killed in
tests/distributed/test_resume.py. Exit status 1 with the first difference, or with what a worker said when it failed.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import yaml
from safetensors.torch import load_file

import mslt.train  # noqa: F401 - with all it imports, so that no fork has to
from benchmarks.record import hardware, heading, table, this_command, write_record
from data_prep.prepare import prepare
from data_prep.recipe import DataRecipe
from mslt import metrics
from mslt.cli import worker
from mslt.config import load_recipe
from mslt.data import keyed
from mslt.data.manifest import read_manifest
from mslt.engine.ds_config import read_engine_config
from mslt.plan import Plan
from mslt.provenance import provenance
from mslt.rundir import RunDir, read_summaries
from mslt.schedule import make_plan
from mslt.validation import validate

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # read when DeepSpeed and torch are imported
SOURCES = {
    "sources": [{"kind": "python_docs", "max_files": 300}], "vocabulary": {"size": 512}, "validation_share": 0.1,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "model": {
        "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
        "vocab_size": 512, "max_position_embeddings": 32, "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    },
    "data": {"shards": "given on the command line", "max_predictions": 5, "evaluation_samples": 32},
    "schedule": {"name": "mslt", "k": 2, "steps": 400, "retrain_share": 0.3, "optimizer_state": "carry"},
    "training": {"sequence_length": 32, "batch_size": 8, "micro_batch_size": 2},
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 20},
    "watch": {"log_every": 1, "checkpoint_every": 5},
}  # fmt: skip

# What a kill is aimed at: its share of the kills, and over how many seconds the moment is spread from there on (see
# `moment_comes`). What it hit is seen afterwards.
AIMS = {
    "start-up": (0.15, 1.5),
    "steps": (0.3, 3.0),
    "save": (0.2, 0.02),
    "boundary": (0.1, 1.0),
    "model": (0.1, 0.04),
    "base": (0.15, 0.02),
}
KINDS = {
    "start-up": "start-up, before the first new step",
    "start-up at a boundary": "start-up at a boundary, nothing being written",
    "steps": "steps, no checkpoint under way",
    "save": "a checkpoint half written",
    "model": "boundary: a stage's model half written, or whole and the stage not DONE",
    "base": "boundary: the next stage's base, or what its optimizer takes over, half made",
    "boundary": "boundary: elsewhere between a stage's last checkpoint and the next one's first step",
}
GRACE_S = 5.0  # for the other ranks to see that one is gone
LAUNCH_S = 300.0  # no launch takes nearly as long, unless it hangs
MAY_DIFFER = ("train_s", "samples_per_s", "spent_s", "gathered_bytes")  # ZeRO-3 gathers more after every start


@dataclass(frozen=True)
class Setup:
    """What all launches share. `folder` holds the run directories and what their workers said."""

    folder: Path
    shards: Path
    recipe: Path
    plan: Plan
    workers: int
    seed: int


@dataclass(frozen=True)
class Launch:
    """The ranks of one start, and what they found: the stage and the run's step from which they go on, and the metrics
    so far, held open: resuming puts another file in their place, and so shows that it did."""

    ranks: list[BaseProcess]
    began: float
    stage_index: int
    first_step: int
    metrics_before: TextIO | None


@dataclass
class Tally:
    """`kills` has a line for each, `of_this_run` those since the last comparison; `steps` counts what was logged."""

    kills: list[str] = field(default_factory=list)
    of_this_run: list[str] = field(default_factory=list)
    hits: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, which ranks)
    survivors: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    runs: int = 0
    steps: int = 0


def main() -> None:
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ENVIRONMENT})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engine", default="zero0_fp32")
    parser.add_argument("--record", type=Path, help="Markdown file to write, beside printing it")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    if options.kills < 1:
        parser.error("--kills: one at least")
    folder = out / f"{options.engine}-{options.workers}-workers-seed-{options.seed}"
    if folder.exists():
        parser.error(f"{folder}: exists; remove it, or name another OUT")
    setup = prepared(out / "shards", folder, options.engine, options.workers, options.seed)

    undisturbed, tally = RunDir(folder / "undisturbed"), Tally()
    began = time.perf_counter()
    while undisturbed.first_unfinished(setup.plan) is not None:
        attempt(setup, undisturbed, Tally(), kill=False)
    undisturbed_s = time.perf_counter() - began
    print(f"undisturbed: {setup.plan.steps} steps in {undisturbed_s:.1f} s", flush=True)
    began = time.perf_counter()
    while len(tally.kills) < options.kills:
        run = RunDir(folder / f"killed-{tally.runs + 1}")
        tally.of_this_run.clear()
        while run.first_unfinished(setup.plan) is not None:
            attempt(setup, run, tally, kill=len(tally.kills) < options.kills)
        if (difference := first_difference(undisturbed, run)) is not None:
            fail(setup, run, tally, difference)
        tally.runs += 1
        print(f"{run.path.name}, killed {len(tally.of_this_run)} times: no difference", flush=True)
        shutil.rmtree(run.path)
    seconds = time.perf_counter() - began
    write_record(options.record, report(setup, options.engine, tally, num_tensors(undisturbed), undisturbed_s, seconds))


def prepared(shards: Path, folder: Path, engine: str, workers: int, seed: int) -> Setup:
    folder.mkdir(parents=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "engine": engine}))
    preparing = fork(prepare, validate(DataRecipe, SOURCES, "shards"), shards)  # its threads are none of ours
    preparing.join()
    assert preparing.exitcode == 0
    plan = make_plan(load_recipe(str(path)), read_engine_config(engine), read_manifest(shards).hash)
    return Setup(folder, shards, path, plan, workers, seed)


def fork(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """Run `target` in a fork of this process, which must have no other threads: those would be missing there."""
    assert (others := other_threads()) <= {"jemalloc_bg_thd"}, others  # pyarrow's; jemalloc sees to forks itself
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def other_threads() -> set[str]:
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return {(task / "comm").read_text().strip() for task in tasks}


def start(setup: Setup, run: RunDir) -> Launch:
    """Start all ranks in the run directory, as a launcher would."""
    stage_index = run.first_unfinished(setup.plan)
    assert stage_index is not None
    first_step = setup.plan.first_step(stage_index) + max(committed(run, stage_index), default=0)
    before = open(run.metrics) if run.metrics.exists() else None  # noqa: SIM115 - closed by `attempt`
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.time()
    ranks = [fork(work, setup, run, rank, port) for rank in range(setup.workers)]
    return Launch(ranks, began, stage_index, first_step, before)


def work(setup: Setup, run: RunDir, rank: int, port: int) -> None:
    """What one rank does, in its own process."""
    said = os.open(log_of(setup, run), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(said, stream.fileno())
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(setup.workers)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    sys.argv = ["worker", str(setup.recipe), "--run-dir", str(run.path), "--shards", str(setup.shards)]
    torch.set_num_threads(1)
    worker.main()


def log_of(setup: Setup, run: RunDir) -> Path:
    return setup.folder / f"{run.path.name}.log"


def attempt(setup: Setup, run: RunDir, tally: Tally, kill: bool) -> None:
    """Start the run once, and kill it at the moment drawn for this launch, or see it end before that."""
    tally.launches += 1
    launch = start(setup, run)
    try:
        if kill and moment_comes(setup, run, tally, launch):
            strike(setup, run, tally, launch)
        else:
            see_end(setup, run, tally, launch)
        tally.steps += reached_step(run, launch) - launch.first_step
    finally:
        for rank in launch.ranks:
            rank.kill()
            rank.join()
        if launch.metrics_before is not None:
            launch.metrics_before.close()


def draw(setup: Setup, tally: Tally, purpose: str) -> float:
    """Uniform in [0, 1), for this launch."""
    return float(keyed.uniform(setup.seed, purpose, tally.launches))


def moment_comes(setup: Setup, run: RunDir, tally: Tally, launch: Launch) -> bool:
    """Wait for the moment drawn for this launch. False where a rank ends first."""
    up_to = list(accumulate(share for share, _ in AIMS.values()))
    aim = list(AIMS)[bisect(up_to, draw(setup, tally, "aim"))]

    stage_index = launch.stage_index
    begun: dict[str, Callable[[], bool]] = {
        "steps": lambda: reached_step(run, launch) > launch.first_step,
        "save": lambda: is_saving(run, launch),
        "boundary": lambda: setup.plan.stages[stage_index].steps in committed(run, stage_index),
        "model": lambda: is_new(half_written_model(run, stage_index), launch),
        "base": lambda: run.stage(stage_index + 1).path.exists(),
    }

    def comes(what: str, poll_s: float) -> bool:
        while not ended(launch, poll_s):
            if begun[what]():
                return True
            if time.time() > launch.began + LAUNCH_S:
                fail(setup, run, tally, f"the launch hangs (the kill waits for {what})")
        return False

    if aim in ("steps", "save") and not comes("steps", 0.05):
        return False
    if aim == "save" and ended(launch, draw(setup, tally, "before") * AIMS["steps"][1]):
        return False
    if aim not in ("start-up", "steps") and not comes(aim, 0.001):
        return False
    return not ended(launch, draw(setup, tally, "after") * AIMS[aim][1])


def ended(launch: Launch, timeout_s: float) -> bool:
    """Whether a rank ends within this time."""
    return bool(wait([rank.sentinel for rank in launch.ranks], timeout_s))


def strike(setup: Setup, run: RunDir, tally: Tally, launch: Launch) -> None:
    """Kill one rank or all, see what that hit, and let no rank outlive it by long."""
    victims = launch.ranks
    if draw(setup, tally, "all") < 0.5:
        victims = [launch.ranks[int(draw(setup, tally, "rank") * setup.workers)]]
    for victim in victims:
        victim.kill()
    for victim in victims:
        victim.join()
    if any(victim.exitcode != -signal.SIGKILL for victim in victims):
        see_end(setup, run, tally, launch)  # it ended in that very moment
        return
    kind, step = hit(setup.plan, run, launch), reached_step(run, launch)
    deadline = time.time() + GRACE_S
    for rank in launch.ranks:
        if rank not in victims:
            rank.join(max(deadline - time.time(), 0))
            tally.survivors["had to be ended" if rank.exitcode is None else "ended by themselves"] += 1
    who = f"rank {launch.ranks.index(victims[0])}" if len(victims) == 1 else "all ranks"
    tally.hits[kind, who] += 1
    line = f"kill {len(tally.kills) + 1}: {kind}, {who}, {run.path.name} at step {step}"
    tally.kills.append(line)
    tally.of_this_run.append(line)
    print(f"{line}, after {time.time() - launch.began:.1f} s", flush=True)


def see_end(setup: Setup, run: RunDir, tally: Tally, launch: Launch) -> None:
    """Wait for the ranks to end as they should. (With ZeRO-3 that is after every stage.)"""
    for rank in launch.ranks:
        rank.join(max(launch.began + LAUNCH_S - time.time(), 0))
    statuses = [rank.exitcode for rank in launch.ranks]
    if any(statuses) or None in statuses or run.first_unfinished(setup.plan) == launch.stage_index:
        said = log_of(setup, run).read_text()[-3000:]
        fail(setup, run, tally, f"the ranks ended with {statuses} (None: hang) and said:\n{said}")


def committed(run: RunDir, stage_index: int) -> set[int]:
    """Steps of the stage that have a checkpoint."""
    return {int(path.name.removeprefix("step-")) for path in run.stage(stage_index).checkpoints.glob("step-*")}


def reached_step(run: RunDir, launch: Launch) -> int:
    """The run's last step that this launch has logged, or the one it goes on from."""
    if not run.metrics.exists():
        return launch.first_step
    before = launch.metrics_before
    if before is not None and os.path.samestat(os.fstat(before.fileno()), os.stat(run.metrics)):
        return launch.first_step
    steps = (record["step"] for record in metrics.read(run.metrics) if record["kind"] == "train")
    return max([launch.first_step, *steps])


def is_saving(run: RunDir, launch: Launch) -> bool:
    """Whether this launch is writing a checkpoint of steps; what a stage's optimizer takes over is checkpoint 0."""
    half_written = run.path.glob("stage-*/checkpoints/.step-*.tmp")
    return any(path.name != ".step-00000000.tmp" and is_new(path, launch) for path in half_written)


def half_written_model(run: RunDir, stage_index: int) -> Path:
    return run.stage(stage_index).path / ".model.tmp"


def is_new(path: Path, launch: Launch) -> bool:
    """Whether something is there that was not left by an earlier launch."""
    try:
        return path.stat().st_mtime > launch.began
    except FileNotFoundError:
        return False


def hit(plan: Plan, run: RunDir, launch: Launch) -> str:
    """What the ranks were at, from what they left: one of KINDS."""
    step, stage_index = reached_step(run, launch), run.first_unfinished(plan)
    if stage_index is None:
        return "boundary"
    where, checkpoints = run.stage(stage_index), committed(run, stage_index)
    ending = plan.stages[stage_index].steps in checkpoints
    beginning = stage_index > 0 and step == plan.first_step(stage_index)
    if ending and (is_new(half_written_model(run, stage_index), launch) or is_new(where.model, launch)):
        return "model"
    if beginning and not checkpoints and is_new(where.path, launch):
        return "base"
    if step == launch.first_step:
        return "start-up at a boundary" if ending or beginning else "start-up"
    if ending or beginning:
        return "boundary"
    return "save" if is_saving(run, launch) else "steps"


def first_difference(expected: RunDir, found: RunDir) -> str | None:
    """The first thing in which two finished runs differ: losses and all else logged, summaries, tensors."""
    for one, other in zip_longest(records(expected), records(found)):
        if one != other:
            return f"metrics.jsonl has {other}, the undisturbed run {one}"
    for one, other in zip_longest(read_summaries(expected), read_summaries(found)):
        if timeless(one) != timeless(other):
            return f"a summary has {timeless(other)}, the undisturbed run {timeless(one)}"
    files = tensor_files(expected)
    if files != tensor_files(found):
        return f"tensors are in {tensor_files(found)}, in the undisturbed run in {files}"
    for file in files:
        one, other = load_file(expected.path / file), load_file(found.path / file)
        if one.keys() != other.keys():
            return f"{file} holds other tensors"
        for name in one:
            if not torch.equal(one[name], other[name]):
                return f"{name} in {file} differs by up to {(one[name] - other[name]).abs().max().item():g}"
    return None


def records(run: RunDir) -> list[dict[str, Any]]:
    return [timeless(record) for record in metrics.read(run.metrics)]


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in MAY_DIFFER}


def tensor_files(run: RunDir) -> list[str]:
    """Every stage's base, last checkpoint and model, and anything that should not be there."""
    return sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*.safetensors*"))


def num_tensors(run: RunDir) -> int:
    return sum(len(load_file(run.path / file)) for file in tensor_files(run))


def fail(setup: Setup, run: RunDir, tally: Tally, what: str) -> NoReturn:
    kills = "\n".join(tally.of_this_run) or "not killed"
    print(f"seed {setup.seed}, launch {tally.launches}, {run.path}: {what}\n{kills}", file=sys.stderr)
    sys.exit(1)


def report(
    setup: Setup, engine: str, tally: Tally, num_tensors: int, undisturbed_s: float, seconds: float
) -> list[str]:
    ranks = [f"rank {rank}" for rank in range(setup.workers)]
    whom = [*ranks, "all ranks"] if setup.workers > 1 else ranks
    counts = [(text, [tally.hits[kind, who] for who in whom]) for kind, text in KINDS.items()]
    counts.append(("all", [sum(n for (_, killed), n in tally.hits.items() if killed == who) for who in whom]))
    survivors = ", ".join(f"{count} {how}" for how, count in tally.survivors.items())
    twice = tally.steps - tally.runs * setup.plan.steps
    return [
        *heading(f"Killed and resumed, {engine}", this_command(), provenance(), hardware()),
        f"A run of {setup.plan.steps} steps in {len(setup.plan.stages)} stages on {setup.workers} worker(s), dropout "
        f"{setup.plan.model.hidden_dropout_prob}, a checkpoint every {RECIPE['watch']['checkpoint_every']} steps. "
        f"{len(tally.kills)} kills (seed {setup.seed}) in {tally.launches} launches, by which {tally.runs} run(s) were "
        f"done; they logged {tally.steps:,} steps, {twice:,} of them a second time. Each run beside the undisturbed "
        "one:",
        "",
        "- every record of metrics.jsonl and every summary is equal, seconds and gathered bytes apart: losses, "
        "accuracies, gradient norm and trust ratios of each step, held-out losses;",
        f"- the {num_tensors:,} tensors of all bases, last checkpoints (weights and moments) and models are equal, bit "
        "for bit, and no other tensor file is left.",
        "",
        *table(["hit by SIGKILL", *whom], [[text, *map(str, numbers)] for text, numbers in counts]),
        "",
        f"Of the ranks that a kill left alone, in {GRACE_S:g} s: {survivors or 'there were none'}.",
        "",
        f"The undisturbed run takes {undisturbed_s:.0f} s, a kill with what it costs "
        f"{seconds / len(tally.kills):.1f} s. Neither is a claim.",
    ]


if __name__ == "__main__":
    main()
