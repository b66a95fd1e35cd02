"""When does which option of the ramps help? Each is trained on the same rows and swept over the same others: a record.

python -m benchmarks.early_exit_options TUNED --encoder CKPT --task SST-2 --data-dir GLUE --work DIR --record FILE

TUNED is a fine-tuned model (`mslt evaluate glue … --save-models`), CKPT what it was fine-tuned from, for the pretrained
pooler and for joint training, and --run the run that it was pretrained in, for the poolers of its stages. What is done
in DIR is not done again, what was done with other settings is refused.
"""

import argparse
import os
from pathlib import Path

from benchmarks.record import hardware, heading, table, this_command, write_record
from mslt.cli import exit as exit_command
from mslt.errors import MsltError
from mslt.evaluate.exit_sweep import (
    best_within,
    calibrate,
    each_exit_alone,
    entropy_rules,
    keep,
    patience_rules,
    sweep,
)
from mslt.evaluate.exits import exit_logits_of, heldout, open_exits
from mslt.provenance import provenance

DROP = 0.005
COLUMNS = ["ramps", "each exit alone", "whole", "saving within 0.5 points, by entropy", "by patience", "at 2 points",
           "held out: one threshold", "one for each layer"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuned")
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--run")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--subset", action="store_true", help="the files hold a part of GLUE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--max-train-rows", type=int)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, help="of joint training")
    parser.add_argument("--epochs", type=int, help="of joint training")
    parser.add_argument("--batch-size", type=int, help="of joint training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--only", nargs="+", help="names of options")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    tuned, encoder = arguments.tuned, arguments.encoder
    joint = {"joint": True, "learning_rate": arguments.learning_rate, "epochs": arguments.epochs,
             "batch_size": arguments.batch_size}  # fmt: skip
    options = {
        "paper": (tuned, {"preset": "paper"}),
        "paper-code": (tuned, {"preset": "paper-code", "ramp_init_from": encoder}),
        "ours (cls, finetuned)": (tuned, {}),
        "pretrained pooler": (tuned, {"ramp_init": "pretrained", "ramp_init_from": encoder}),
        "random": (tuned, {"ramp_init": "random"}),
        "mean": (tuned, {"pooling": "mean"}),
        "distilled by half": (tuned, {"distillation": 0.5}),
        "mean, distilled": (tuned, {"pooling": "mean", "distillation": 1.0}),
        "joint": (encoder, joint),
        "joint, mean": (encoder, {**joint, "pooling": "mean"}),
        "joint, mean, distilled by half": (encoder, {**joint, "pooling": "mean", "distillation": 0.5}),
    }
    if arguments.run is not None:
        options["stages"] = (tuned, {"ramp_init": "stages", "ramp_init_from": arguments.run})
    rows = []
    for name, (checkpoint, changes) in options.items():
        if arguments.only is not None and name not in arguments.only:
            continue
        for seed in arguments.seeds:
            folder = arguments.work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            exit_command.train(
                checkpoint, arguments.task, folder, arguments.data_dir, subset=arguments.subset, seed=seed,
                max_train_rows=arguments.max_train_rows, max_tokens=arguments.max_tokens, **changes,
            )  # fmt: skip
            cells = _row(folder, arguments.data_dir, arguments.subset)
            rows.append([name if len(arguments.seeds) == 1 else f"{name}, seed {seed}", *cells])
    num_rows = "all" if arguments.max_train_rows is None else f"{arguments.max_train_rows:,}"
    lines = [
        *heading(f"Options of off-ramps: {arguments.task}", this_command(), provenance(), hardware()),
        f"{os.path.basename(os.path.normpath(encoder))}, {num_rows} training rows, "
        f"{arguments.max_tokens} tokens{', of a part of GLUE' if arguments.subset else ''}; swept over the whole "
        "validation split, on which each row's threshold was also chosen, as in the paper; in the last two columns",
        "chosen on one half for 0.5 points, and judged by the other: saving, and points. Exits count from 0; the drop "
        "is from the row's own whole model.",
        "",
        *table(COLUMNS, rows),
    ]
    write_record(arguments.record, lines)


def _row(folder: Path, data_dir: Path, is_subset: bool) -> list[str]:
    opened = open_exits(folder, None, "cpu")
    split = heldout(opened.task, data_dir, is_subset, opened.task.validation[0])
    kept = keep(opened, split, exit_logits_of(opened.exits, split, opened.batch_of))
    alone = [found[kept.metric] for found in each_exit_alone(kept)]
    by_kind = [sweep(kept, rules) for rules in (entropy_rules(kept), patience_rules(kept))]
    cells = []
    for points, drop in ((by_kind[0], DROP), (by_kind[1], DROP), (by_kind[0], 4 * DROP)):
        best = best_within([(each, each.saving, alone[-1] - each.scores[kept.metric]) for each in points], drop)
        cells.append("–" if best is None else f"{best.saving:.1%} ({best.rule})")
    for per_layer in (False, True):
        if kept.task.is_regression:
            cells.append("–")
            continue
        found = calibrate(kept, DROP, None, None, per_layer, "entropy")
        cells.append(f"{found.saving:.1%} ({0.0 - 100 * found.drop:+.1f})")
    return [" ".join(f"{100 * score:.1f}" for score in alone), f"{100 * alone[-1]:.1f}", *cells]


if __name__ == "__main__":
    try:
        main()
    except MsltError as error:
        raise SystemExit(f"early_exit_options: {error}") from None
