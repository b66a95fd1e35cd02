"""Does growing learn? 12 layers × 128 on real Wikipedia and books, k=4 and retraining, two workers.

    python -m benchmarks.real_text DATA OUT [--record FILE]

DATA holds wikipedia/extracted (WikiExtractor's output) and books (Project Gutenberg); OUT gets shards and run.
Exit status 1 when a criterion is missed; the record says which. It measures learning, not speed.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.record import hardware, heading, table, write_record
from mslt.data.manifest import read_manifest
from mslt.rundir import RunDir, read_plan, read_summaries

RECIPES = Path(__file__).parent / "recipes"
MAX_GROWTH_JUMP = 0.3  # nats
MIN_GAIN_OVER_UNIGRAMS = 1.0  # nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--record", type=Path, help="Markdown file to write; default OUT/record.md")
    options = parser.parse_args()
    out = options.out.resolve()
    shards, run = out / "shards", RunDir(out / "run")
    mslt = [sys.executable, "-m", "mslt.cli.main"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    data_recipe = RECIPES / "real-text-data.yaml"
    prepare = [*mslt, "data", "prepare", str(data_recipe), str(shards)]
    subprocess.run(prepare, check=True, cwd=options.data, env=environment)  # its sources count from there
    train = [*mslt, "train", str(RECIPES / "real-text.yaml"), "--shards", str(shards), "--run-dir", str(run.path)]
    subprocess.run([*train, "--workers", "2"], check=True, env=environment)
    sys.exit(0 if report(run, shards, options.record or out / "record.md") else 1)


def report(run: RunDir, shards: Path, record: Path) -> bool:
    """Write the record of a finished run; True when every criterion holds."""
    manifest, plan, summaries = read_manifest(shards), read_plan(run), read_summaries(run)
    entropy = manifest.unigram_entropy_nats
    assert entropy is not None
    before = [summary["evaluation_before"]["mlm_loss"] for summary in summaries]
    after = [summary["evaluation_after"]["mlm_loss"] for summary in summaries]
    jumps = [start - end for start, end in zip(before[1:], after[:-1], strict=True)]
    criteria = {
        "every stage lowers the held-out MLM loss": all(b > a for b, a in zip(before, after, strict=True)),
        f"growth moves it by less than {MAX_GROWTH_JUMP} nats": all(abs(jump) < MAX_GROWTH_JUMP for jump in jumps),
        f"the end is at least {MIN_GAIN_OVER_UNIGRAMS} nat under the unigram entropy": (
            after[-1] <= entropy - MIN_GAIN_OVER_UNIGRAMS
        ),
    }
    rows = [
        [
            f"{summary['stage']} ({summary['depth']} layers)",
            f"{summary['steps']:,}",
            f"{summary['trainable_parameters']:,}",
            f"{before[index]:.4f}",
            f"{after[index]:.4f}",
            f"{jumps[index - 1]:+.4f}" if index else "",
            f"{summary['evaluation_after']['nsp_accuracy']:.1%}",
            f"{summary['spent_s']['train']:,.0f}",
            f"{summary['reduced_bytes'] / 1e9:.2f}",
        ]
        for index, summary in enumerate(summaries)
    ]
    train, heldout = manifest.splits["train"], manifest.splits["validation"]
    provenance = json.loads((run.path / "provenance.json").read_text())
    precision = plan.engine.get("torch_autocast", {}).get("dtype", "fp32")
    columns = ["stage", "steps", "trainable", "MLM before", "MLM after", "growth", "NSP", "train s", "reduced GB"]
    lines = heading("Growing on real text", "python -m benchmarks.real_text DATA OUT", provenance, hardware())
    lines += [
        f"Recipe `benchmarks/recipes/real-text.yaml`: 12 layers × 128, T={plan.stages[0].sequence_length}, batch "
        f"{plan.stages[0].batch_size}, {plan.steps:,} steps, {summaries[-1]['world_size']} workers, seed "
        f"{plan.stages[0].seed}, {precision}. Text: 20 files of English Wikipedia and 20 books, {train.tokens:,} "
        f"training tokens, {heldout.tokens:,} held out ({plan.data.evaluation_samples:,} samples at most, at fixed "
        "masks). "
        "Losses are held-out, in nats a masked token. One run. Seconds are not a claim: the machine was shared.",
        "",
        *table(columns, rows),
        "",
        f"Unigram entropy of the held-out text: {entropy:.4f} nats. The end, {after[-1]:.4f}, is "
        f"{entropy - after[-1]:.4f} under it.",
        "",
        *(f"- {'held' if holds else 'MISSED'}: {criterion}" for criterion, holds in criteria.items()),
    ]
    write_record(record, lines)
    return all(criteria.values())


if __name__ == "__main__":
    main()
