"""The correctness half of the GPU suite: see gpu_suite.sh.

1. The main job (quickstart: k=3 and retraining, and its baseline) in bf16 and fp16 under ZeRO-0; in bf16 again with
   all layers compiled, frozen ones in int8, and micro-batches that are measured.
2. One stage without dropout on the GPU, in each precision and ZeRO stage, beside the CPU in fp32, loss by loss.
3. The main job in bf16 and fp16 killed in every stage and resumed, beside the undisturbed one.
"""

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from benchmarks.record import hardware, heading, table, write_record
from mslt.config import load_recipe
from mslt.provenance import provenance
from mslt.rundir import RunDir, read_plan, read_summaries
from tests.distributed.runs import losses, train_and_kill

RECIPES = Path(__file__).parent / "recipes"
PARITY_ENGINES = tuple(f"zero{stage}_{precision}" for precision in ("fp32", "bf16", "fp16") for stage in (0, 1, 2))
# Largest difference of a step's MLM loss from the CPU's in fp32 that rounding explains, in nats at a loss of 6 to 8:
# bf16 keeps 8 bits (relative 4e-3 a value, averaged over 300 predictions), fp16 11, fp32 with TF32 off 24.
PARITY_NATS = {"fp32": 0.005, "bf16": 0.1, "fp16": 0.05}
# Atomics in CUDA's backward passes add in any order, so a resumed run is near, not equal; on the CPU it is equal.
RESUME_NATS = 0.1
CHECKPOINT_EVERY = 4
REHEARSED_STEPS_VARIABLE = "MSLT_REHEARSED_STEPS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/gpu-suite"))
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="go through it on the CPU, with 48 steps of 2 samples a run; criteria on learning then do not hold",
    )
    options = parser.parse_args()
    if options.rehearse:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", REHEARSED_STEPS_VARIABLE: "48"}
    elif not torch.cuda.is_available():
        sys.exit("gpu_suite: no CUDA device is seen by this torch; --rehearse goes through the steps on the CPU")
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    shards = folder / "shards"
    run_verb("data", "prepare", "data-quickstart", shards)

    workers = max(torch.cuda.device_count(), 1)
    job_lines, job_holds = main_job(folder, shards, workers)
    parity_lines, parity_holds = parity(folder, shards)
    resume_lines, resume_holds = kill_and_resume(folder, shards, workers)
    where = "rehearsal on the CPU" if options.rehearse else hardware()
    lines = heading("GPU suite: correctness", "bash benchmarks/gpu_suite.sh", provenance(), where)
    write_record(folder / "record.md", [*lines, *job_lines, *parity_lines, *resume_lines])
    sys.exit(0 if job_holds and parity_holds and resume_holds else 1)


def run_verb(*arguments: str | Path, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "mslt.cli.main", *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, **(environment or {})})


def variant(folder: Path, base: str, engine: str, fast: bool = False) -> Path:
    """`base` with another engine, every step logged and every fourth saved, as a recipe of its own; `fast` with all
    that may make its steps faster."""
    path = folder / f"{Path(base).stem}-{engine}{'-fast' if fast else ''}.yaml"
    recipe = load_recipe(base)
    schedule, training, data = (part.model_dump() for part in (recipe.schedule, recipe.training, recipe.data))
    if fast:
        schedule |= {"frozen_precision": "int8"}
        training |= {"compile": "all", "micro_batch_size": "auto"}
    if REHEARSED_STEPS_VARIABLE in os.environ:
        schedule |= {"steps": int(os.environ[REHEARSED_STEPS_VARIABLE])}
        training |= {"batch_size": 2}
        data |= {"evaluation_samples": 16}
    watch = {"log_every": 1, "evaluate_every": 50, "checkpoint_every": CHECKPOINT_EVERY}
    parts = {"schedule": schedule, "training": training, "data": data, "watch": watch}
    path.write_text(yaml.safe_dump({"extends": base, "engine": engine, **parts}))
    return path


def main_job(folder: Path, shards: Path, workers: int) -> tuple[list[str], bool]:
    rows, holds = [], True
    plain = [(base, precision, False) for precision in ("bf16", "fp16") for base in ("quickstart-full", "quickstart")]
    for base, precision, fast in (*plain, ("quickstart", "bf16", True)):
        recipe = variant(folder, base, f"zero0_{precision}", fast)
        run = RunDir(folder / f"{base}-{precision}{'-fast' if fast else ''}")
        run_verb("train", recipe, "--shards", shards, "--run-dir", run.path, "--workers", str(workers))
        summaries = read_summaries(run)
        before, after = summaries[0]["evaluation_before"], summaries[-1]["evaluation_after"]
        learned = after["mlm_loss"] < before["mlm_loss"] - 1.5
        holds &= learned
        rows.append([
            f"{base}, {precision}" + (", compiled, int8, measured micro-batches" if fast else ""),
            str(sum(s["steps"] for s in summaries)), f"{before['mlm_loss']:.4f}", f"{after['mlm_loss']:.4f}",
            f"{sum(s['reduced_bytes'] for s in summaries) / 1e9:.3f}",
            f"{sum(s['spent_s']['train'] for s in summaries):.1f}", "yes" if learned else "NO",
        ])  # fmt: skip
    columns = ["run", "steps", "held-out MLM before", "after", "reduced GB", "train s", "fell by 1.5 nats"]
    return ["## The main job", "", *table(columns, rows), ""], holds


def parity(folder: Path, shards: Path) -> tuple[list[str], bool]:
    base = str(RECIPES / "gpu-parity.yaml")
    reference = folder / "parity-cpu-fp32"
    run_verb("train", variant(folder, base, "zero0_fp32"), "--shards", shards, "--run-dir", reference, "--workers", "1",
             environment={"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})  # fmt: skip
    expected, rows, holds = losses(reference), [], True
    for engine in PARITY_ENGINES:
        run, allowed = folder / f"parity-{engine}", PARITY_NATS[engine.split("_")[1]]
        run_verb("train", variant(folder, base, engine), "--shards", shards, "--run-dir", run, "--workers", "1")
        found = losses(run)
        differences = [abs(found[step][0] - expected[step][0]) for step in expected]
        holds &= max(differences) <= allowed
        rows.append([engine, f"{differences[0]:.2e}", f"{max(differences):.2e}", f"{allowed:g}"])
    columns = ["engine", "first step", "largest of 40 steps", "allowed"]
    title = "## One stage beside the CPU in fp32: difference of the MLM loss, nats"
    return [title, "", *table(columns, rows), ""], holds


def kill_and_resume(folder: Path, shards: Path, workers: int) -> tuple[list[str], bool]:
    rows, holds = [], True
    for precision in ("bf16", "fp16"):
        recipe = variant(folder, "quickstart", f"zero0_{precision}")
        undisturbed, killed = folder / f"quickstart-{precision}", folder / f"killed-{precision}"
        plan = read_plan(RunDir(undisturbed))
        rng = random.Random(0)
        kills = [plan.first_step(i) + rng.randrange(CHECKPOINT_EVERY + 1, 11) for i in range(len(plan.stages))]
        if not (killed / "plan.json").exists():
            for step in kills:
                train_and_kill(recipe, shards, killed, workers, step)
        run_verb("train", recipe, "--shards", shards, "--run-dir", killed, "--workers", str(workers))
        expected, found = losses(undisturbed), losses(killed)
        largest = max(abs(found[step][0] - expected[step][0]) for step in expected)
        holds &= largest <= RESUME_NATS and list(found) == list(expected)
        rows.append([precision, ", ".join(map(str, kills)), f"{largest:.2e}", f"{RESUME_NATS:g}"])
    columns = ["precision", "killed after step", "largest difference of a step's MLM loss", "allowed"]
    return ["## Killed in every stage and resumed, beside the undisturbed run", "", *table(columns, rows)], holds


if __name__ == "__main__":
    main()
