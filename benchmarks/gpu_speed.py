"""The speed half of the GPU suite: see gpu_suite.sh.

1. Steps of BERT-Base and BERT-Large: where the time goes in every stage of every schedule, and what was predicted;
   full training and mslt again with frozen layers compiled, all compiled, and frozen ones in int8.
2. The same work in plain Hugging Face and torch DDP, BERT-Base.
3. Activations saved for the backward pass, and peak memory, stage by stage, BERT-Base.
4. How speed scales with batch, depth, sequence length and GPUs, around BERT-Base.
5. The operations of a step of BERT-Base; with several GPUs, what reducing beside computing wins.
Writes FOLDER/speed.json and FOLDER/speed.md.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import step_time
from benchmarks.gpu_correctness import run_verb
from benchmarks.record import hardware, heading, write_record
from mslt.config import Recipe, load_recipe
from mslt.forecast import alternatives
from mslt.provenance import provenance

BATCH_A_GPU = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/gpu-suite"))
    parser.add_argument("--rehearse", action="store_true", help="go through it on the CPU with a small model")
    options = parser.parse_args()
    if options.rehearse:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    elif not torch.cuda.is_available():
        sys.exit("gpu_suite: no CUDA device is seen by this torch; --rehearse goes through the steps on the CPU")
    folder: Path = options.folder
    shards = folder / "shards"
    run_verb("data", "prepare", "data-quickstart", shards)
    workers = max(torch.cuda.device_count(), 1)
    batch = 8 if options.rehearse else BATCH_A_GPU * workers
    lines: list[str] = []
    found = []
    holds = True
    for name in ["quickstart"] if options.rehearse else ["bert-base", "bert-large"]:
        plain = step_time.with_batch(load_recipe(name), batch, workers)
        for title, recipe in {name: plain, **faster(name, plain)}.items():
            names = [each for each in alternatives(recipe) if each != "interleave"]  # its stages are those of stacking
            timed = step_time.time_recipe(recipe, shards, names if recipe is plain else None, workers)
            found.append({"name": title, **step_time.described(recipe, workers, timed)})
            (folder / "speed.json").write_text(json.dumps(found, indent=2))
            told, this_holds = step_time.report(recipe, workers, timed)
            lines += [f"# {title}", "", *told, ""]
            holds = holds and this_holds
    small = ["--layers", "4", "--width", "64"]
    base = ["--layers", "12", "--width", "768", "--vocabulary", "30522"]
    size = [*(small if options.rehearse else base), "--batch", str(batch // workers)]
    of_all = [*size[:-1], str(batch), "--workers", str(workers)]
    dtype = ["--dtype", "fp32" if options.rehearse else "bf16"]
    scaling = ["scaling", str(shards)]
    if options.rehearse:
        scaling += ["--workers", "1", "--batches", "8", "--depths", "2", "--lengths", "64"]
    else:
        scaling += ["--recipe", "bert-base", "--batches", "32", "128", "--depths", "24", "--lengths", "512"]
    parts = [
        ["vs_peers", *of_all, *dtype],
        ["memory", *size],
        scaling,
        ["profile_step", *size, *dtype, "--trace", str(folder / "traces")],
        *([["overlap", *of_all, *dtype]] if workers > 1 else []),
    ]
    for command in parts:
        lines += part(folder, command)
    where = "rehearsal on the CPU" if options.rehearse else hardware()
    head = heading("GPU suite: speed", "bash benchmarks/gpu_suite.sh", provenance(), where)
    write_record(folder / "speed.md", [*head, *lines])
    sys.exit(0 if holds else 1)


def faster(name: str, recipe: Recipe) -> dict[str, Recipe]:
    """The recipe with each of what may make its steps faster."""
    found = {}
    for title, compile_, precision in (
        ("frozen layers compiled", "frozen", "exact"),
        ("all layers compiled", "all", "exact"),
        ("frozen layers compiled, in int8", "frozen", "int8"),
    ):
        training = recipe.training.model_copy(update={"compile": compile_})
        schedule = recipe.schedule.model_copy(update={"frozen_precision": precision})
        found[f"{name}, {title}"] = recipe.model_copy(update={"training": training, "schedule": schedule})
    return found


def part(folder: Path, command: list[str]) -> list[str]:
    """Run another benchmark; its record, or that it failed."""
    name, *arguments = command
    record = folder / f"{name}.md"
    status = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--record", str(record)], check=False
    ).returncode
    if not record.exists():
        return [f"# {name}", "", f"FAILED with status {status}", ""]
    return [*record.read_text().splitlines(), ""]


if __name__ == "__main__":
    main()
