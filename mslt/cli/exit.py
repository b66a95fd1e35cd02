"""`mslt exit`: leave at the first layer that is sure."""

import json
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mslt.cli.refusals import refuse_rate, refuse_unknown
from mslt.errors import MsltError

if TYPE_CHECKING:
    from mslt.evaluate.exit_sweep import Kept
    from mslt.evaluate.exits import Opened
    from mslt.evaluate.glue_data import Row
    from mslt.heads.exit_rule import ExitRule

CALIBRATION = "calibration.json"

app = typer.Typer(help="Early exit: rows leave at the first layer that is sure of its answer.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="EXITS", help="Folder that `mslt exit train` wrote.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder with GLUE's own files. Default: from the hub.", show_default=False)
]
TaskName = Annotated[
    str | None, typer.Option(help="Of GLUE. Default: the one that the ramps were trained on.", show_default=False)
]
Split = Annotated[str | None, typer.Option(help="Default: the (first) validation split.", show_default=False)]
Subset = Annotated[bool, typer.Option("--subset", help="The files hold a part of GLUE; do not count rows.")]
MaxRows = Annotated[int | None, typer.Option(min=1, help="The first so many rows.", show_default=False)]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows at once; those of like length.")]
CheckEvery = Annotated[
    int, typer.Option(min=0, help="Ask the device after so many layers who is done, 0: at the end. For a GPU, to try.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Threshold = Annotated[
    list[float] | None,
    typer.Option(help="Leave below this entropy in nats; one, or one for each layer but the last.", show_default=False),
]
Patience = Annotated[
    int | None,
    typer.Option(help="Leave where so many exits in a row agree with the one before.", show_default=False),
]
Tolerance = Annotated[
    float | None,
    typer.Option(help="With --patience on a regression: scores less than that apart agree.", show_default=False),
]


@app.command(
    "train",
    short_help="Train a ramp behind each layer.",
    epilog="Example: mslt exit train runs/bert-base --task SST-2 --out exits",
)
def train(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="A fine-tuned classifier (its ramps alone are trained), or any BERT, RoBERTa, ELECTRA or run of mslt "
            "(fine-tuned first).",
        ),
    ],
    task: Annotated[str, typer.Option(help="Of GLUE, like SST-2.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    data_dir: Data = None,
    preset: Annotated[
        Literal["paper", "paper-roberta", "paper-code", "paper-code-roberta", "quick"],
        typer.Option(help="Rates, batches and epochs: of Xin et al., of their code, or ours."),
    ] = "quick",
    ramp_init: Annotated[
        Literal["finetuned", "pretrained", "stages", "random"] | None,
        typer.Option(
            help="What the ramps begin from: a pooler, fine-tuned or from before, or a run's stages'. "
            "Default: the preset's, finetuned.",
            show_default=False,
        ),
    ] = None,
    ramp_init_from: Annotated[
        str | None,
        typer.Option(help="With --ramp-init pretrained the checkpoint, with stages the run.", show_default=False),
    ] = None,
    pooling: Annotated[Literal["cls", "mean"], typer.Option(help="What ramps read: first token or all.")] = "cls",
    joint: Annotated[
        bool, typer.Option("--joint", help="Train all exits and the model at once, the later ones weighing more.")
    ] = False,
    distillation: Annotated[
        float, typer.Option(help="Share of the last exit's answer, instead of the label, in a ramp's loss; 0 to 1.")
    ] = 0.0,
    backbone_dropout: Annotated[
        bool | None,
        typer.Option(
            "--backbone-dropout/--no-backbone-dropout",
            help="Of the frozen model, while ramps train. Default: the preset's, off.",
            show_default=False,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of fine-tuning, with --joint of everything.", show_default=False)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of fine-tuning, with --joint of everything.", show_default=False)
    ] = None,
    ramp_learning_rate: Annotated[float | None, typer.Option(help="Of the ramps.", show_default=False)] = None,
    ramp_epochs: Annotated[int | None, typer.Option(min=1, help="Of the ramps.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Instead of the preset's.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Of a row.")] = 128,
    max_train_rows: Annotated[int | None, typer.Option(min=1, help="Train on so many.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of heads, ramps, order and dropout.")] = 42,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub name. Default: the checkpoint's own.", show_default=False)
    ] = None,
    new_pooler: Annotated[
        bool, typer.Option("--new-pooler", help="Where the checkpoint has no pooler, draw one at random.")
    ] = False,
    subset: Subset = False,
    as_json: Json = False,
) -> None:
    """Train a ramp behind each layer but the last: on a fine-tuned model they alone, the model frozen; on another
    both, one after the other, or with --joint at once. What is done is not done again: the same command goes on after
    a stop."""
    from mslt.cli.progress import counted_parts
    from mslt.evaluate.exits import PRESETS, make_exits
    from mslt.evaluate.glue import Source
    from mslt.evaluate.glue_tasks import TASKS
    from mslt.evaluate.opening import locate, open_config
    from mslt.heads.off_ramp import RampOptions
    from mslt.models.families import is_classifiers_config

    _quiet()
    refuse_unknown("--task", task, TASKS)
    for option, rate in (("--learning-rate", learning_rate), ("--ramp-learning-rate", ramp_learning_rate)):
        if rate is not None:
            refuse_rate(option, rate, "5e-5")
    source, _ = locate(checkpoint)
    is_tuned = is_classifiers_config(open_config(source))
    training = PRESETS[preset]
    initial = ramp_init or training.options.initial
    if joint:
        _refuse_idle(
            "with --joint model and ramps train at once, by --learning-rate and --epochs",
            {"--ramp-learning-rate": ramp_learning_rate, "--ramp-epochs": ramp_epochs,
             "--backbone-dropout": backbone_dropout},
        )  # fmt: skip
    elif is_tuned:
        _refuse_idle(
            f"{checkpoint} is fine-tuned, its ramps alone are trained, by --ramp-learning-rate and --ramp-epochs",
            {"--learning-rate": learning_rate, "--epochs": epochs},
        )
    if is_tuned:
        _refuse_idle(f"{checkpoint} is fine-tuned with the pooler it has", {"--new-pooler": new_pooler or None})
    if initial not in ("pretrained", "stages"):
        _refuse_idle("it is for --ramp-init pretrained or stages", {"--ramp-init-from": ramp_init_from})
    stage_1, ramps = training.stage_1, training.ramps
    if joint:  # as a whole model trains, an epoch longer
        stage_1 = replace(stage_1, num_epochs=stage_1.num_epochs + 1)
    if learning_rate is not None:
        stage_1 = replace(stage_1, learning_rate=learning_rate)
    if epochs is not None:
        stage_1 = replace(stage_1, num_epochs=epochs)
    if ramp_learning_rate is not None:
        ramps = replace(ramps, learning_rate=ramp_learning_rate)
    if ramp_epochs is not None:
        ramps = replace(ramps, num_epochs=ramp_epochs)
    if batch_size is not None:
        stage_1, ramps = replace(stage_1, batch_size=batch_size), replace(ramps, batch_size=batch_size)
    training = replace(
        training,
        stage_1=replace(stage_1, seed=seed),
        ramps=replace(stage_1 if joint else ramps, seed=seed),
        max_tokens=max_tokens,
        joint=joint,
        distillation=distillation,
        backbone_dropout=training.backbone_dropout if backbone_dropout is None else backbone_dropout,
        options=RampOptions(initial, pooling),
    )
    with counted_parts() as tell:
        found = make_exits(
            Source(source, tokenizer, data_dir, subset, max_train_rows, new_pooler),
            TASKS[task], training, out, _device(), tell, ramp_init_from,
        )  # fmt: skip
    what = {"ramps": "ramps on the model as it is", "both": "the model, then its ramps", "joint": "model and ramps"}
    if as_json:
        typer.echo(json.dumps({"out": str(out), **found}, indent=2))
    else:
        typer.echo(f"{out}: {what[found['stages']]}, trained on {found['rows']:,} rows of {task}")


@app.command(
    "eval", short_help="Score a folder of exits by one rule.", epilog="Example: mslt exit eval exits --threshold 0.2"
)
def evaluate(
    folder: Folder,
    threshold: Threshold = None,
    patience: Patience = None,
    tolerance: Tolerance = None,
    batch_size: BatchSize = 32,
    check_every: CheckEvery = 1,
    task: TaskName = None,
    data_dir: Data = None,
    split: Split = None,
    subset: Subset = False,
    max_rows: MaxRows = None,
    as_json: Json = False,
) -> None:
    """Run with rows leaving: the task's metrics, the saving, and where rows left. Without a rule, by the one that
    `mslt exit calibrate` chose; of the rows that it was given, those that it did not choose on."""
    from mslt.cli.progress import counted
    from mslt.evaluate.exit_sweep import as_plain, halves
    from mslt.evaluate.exits import rows_digest, run_exits
    from mslt.heads.exit_rule import counts, expected_saving

    opened, rows, split = _open(folder, task, data_dir, split, subset, max_rows)
    rule, calibrated = _rule(opened, threshold, patience, tolerance)
    _refuse_unfit(opened, rule)
    rule_from = "the command line"
    if calibrated is not None:
        data, settings = calibrated["data"], calibrated["settings"]
        rule_from = f"{CALIBRATION}, chosen on half of {data['rows']:,} rows of {settings['split']}"
        if data["sha256"] == rows_digest(rows):
            rows = [rows[index] for index in halves(len(rows), settings["seed"])[1]]
            rule_from += "; these are the other half"
        else:
            rule_from += "; some of them may be among these"
    with counted("rows") as progress:
        exited = run_exits(opened, rows, rule, batch_size, progress, check_every)
    num_leaving = counts(exited[1], opened.exits.num_exits)
    found: dict[str, Any] = {
        "exits": str(folder), "task": opened.task.name, "split": split, "rows": len(rows), "rule": as_plain(rule),
        "rule_from": rule_from,
        "scores": opened.scores(exited[0], rows), "expected_saving": expected_saving(num_leaving),
        "num_leaving": num_leaving,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{folder}: {opened.task.name}, {len(rows):,} rows of {split}; {rule}, from {rule_from}")
    typer.echo("  " + ", ".join(f"{name} {value:.4f}" for name, value in found["scores"].items()))
    typer.echo(f"  {found['expected_saving']:.1%} of the layers saved; rows that left behind layer (from 0): "
               + ", ".join(f"{k}: {n}" for k, n in enumerate(num_leaving)))  # fmt: skip


@app.command(
    "sweep",
    short_help="Score every threshold; draw the paper's figures.",
    epilog="Example: mslt exit sweep exits --out report",
)
def sweep(
    folders: Annotated[
        list[Path], typer.Argument(metavar="EXITS…", help="Folders that `mslt exit train` wrote, side by side.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the paper's table and figures: PNG, CSV, JSON.", show_default=False)
    ] = None,
    task: TaskName = None,
    data_dir: Data = None,
    split: Annotated[
        str | None, typer.Option(help="Default: the validation split, of MNLI both.", show_default=False)
    ] = None,
    subset: Subset = False,
    max_rows: MaxRows = None,
    as_json: Json = False,
) -> None:
    """Every threshold and every patience from one pass over the rows: quality beside saving, each exit alone, where
    rows leave. With --out Table 1 and Figures 2 to 6 of Xin et al. 2020 for these models; Figure 3 of what
    `mslt exit bench` has written."""
    if out is not None and out.exists() and not out.is_dir():
        raise MsltError(f"--out {out}: is no folder; name one, or one that does not exist")

    from mslt.evaluate.exit_sweep import plain_sweep
    from mslt.evaluate.exits import heldout, origin
    from mslt.report.exits import lines, write_report

    found, benches = [], []
    for folder in folders:
        opened = _opened(folder, task)
        if out is not None:
            paths = sorted(folder.glob(f"bench-{opened.task.name}-*.json"))
            benches += [_found_by("bench", path, opened) for path in paths]
        for name in opened.task.validation if split is None else (split,):
            rows = heldout(opened.task, data_dir, subset, name)[:max_rows]
            settings = {"split": name, "subset": subset, "max_rows": max_rows}
            found.append({**plain_sweep(str(folder), _kept(opened, rows)), **origin(opened, rows, settings)})
    if out is not None:
        written = write_report(found, benches, out)
        typer.echo(f"{out}: {', '.join(written)}", err=as_json)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for line in lines(found):
            typer.echo(line)


@app.command(
    "bench",
    short_help="Measure the saving by the clock.",
    epilog="Example: mslt exit bench exits --threshold 0.2 --batch-size 32",
)
def bench(
    folder: Folder,
    threshold: Annotated[
        list[float] | None,
        typer.Option(
            help="Entropy in nats; several times for several. Default: those of which about 0, 10, … 60 % "
            "saving is expected.",
            show_default=False,
        ),
    ] = None,
    patience: Annotated[list[int] | None, typer.Option(help="Instead; several times for several.")] = None,
    tolerance: Tolerance = None,
    batch_size: BatchSize = 1,
    check_every: CheckEvery = 1,
    turns: Annotated[int, typer.Option(min=1, help="How often each is timed, in turn.")] = 5,
    task: TaskName = None,
    data_dir: Data = None,
    split: Split = None,
    subset: Subset = False,
    max_rows: MaxRows = None,
    as_json: Json = False,
) -> None:
    """The saving by the clock beside the expected one, against the plain model on the same batches, each padded to its
    longest row alone. Writes EXITS/bench-….json, for Figure 3 of `mslt exit sweep`; its name says task, split, rows,
    batch and --check-every, and the same measured again takes its place."""
    from mslt.cli.progress import counted
    from mslt.evaluate.exit_bench import bench as run_bench
    from mslt.evaluate.exit_bench import plain
    from mslt.evaluate.exit_sweep import rules_near
    from mslt.evaluate.exits import origin
    from mslt.files import write_json
    from mslt.heads.exit_rule import by_entropy, by_patience

    rules = [by_entropy(s) for s in threshold or ()] + [by_patience(t, tolerance) for t in patience or ()]
    if not patience:
        _refuse_idle("it is for --patience", {"--tolerance": tolerance})
    opened, rows, split = _open(folder, task, data_dir, split, subset, max_rows)
    if not rules:
        rules = rules_near(_kept(opened, rows), [share / 10 for share in range(7)])
    for rule in rules:
        _refuse_unfit(opened, rule)
    with counted("turns") as progress:
        timed = run_bench(opened, rows, rules, batch_size, turns, progress, check_every)
    settings = {"batch_size": batch_size, "turns": turns, "check_every": check_every, "split": split, "subset": subset,
                "max_rows": max_rows}  # fmt: skip
    found = {**plain(str(folder), opened, timed), **origin(opened, rows, settings)}
    name = f"bench-{opened.task.name}-{split}-{len(rows)}-batch-{batch_size}-every-{check_every}"
    write_json(folder / f"{name}.json", found)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{folder}: {opened.task.name}, {len(rows):,} rows, {batch_size} at once, {found['threads']} threads; "
               f"the plain model takes {1e3 * found['plain_row_s']:.2f} ms a row")  # fmt: skip
    for each, rule in zip(found["rules"], rules, strict=True):
        typer.echo(f"  {rule!s:>24}: expected {each['expected_saving']:6.1%}, measured {each['measured_saving']:6.1%}, "
                   f"{each['speedup']:.2f}× ({min(each['speedups']):.2f} to {max(each['speedups']):.2f})")  # fmt: skip


@app.command(
    "calibrate",
    short_help="Choose a threshold for a drop or a latency.",
    epilog="Example: mslt exit calibrate exits --max-drop 0.5",
)
def calibrate(
    folder: Folder,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Most that the metric may fall, in points: 0.5 of 100.", show_default=False),
    ] = None,
    max_ms: Annotated[
        float | None,
        typer.Option(help="Most milliseconds that a row on its own may take, measured.", show_default=False),
    ] = None,
    by: Annotated[Literal["entropy", "patience"], typer.Option(help="What rows leave by.")] = "entropy",
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer", help="A threshold for each layer, with --max-drop. To try: more to fit, so more rows."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the halves and the interval.")] = 0,
    task: TaskName = None,
    data_dir: Data = None,
    split: Split = None,
    subset: Subset = False,
    max_rows: MaxRows = None,
    as_json: Json = False,
) -> None:
    """Choose the threshold for a budget on one half of the rows, and say on the other what it costs and saves, with
    95 % intervals. Writes EXITS/calibration.json, which `mslt exit eval` and `export` take."""
    if (max_drop is None) == (max_ms is None):
        raise MsltError("mslt exit calibrate: give either --max-drop POINTS or --max-ms MILLISECONDS")
    if per_layer and max_drop is None:
        raise MsltError("--per-layer: goes with --max-drop")
    if max_drop is not None and not 0 <= max_drop < 100:
        raise MsltError(f"--max-drop {max_drop}: give points, 0 or more and below 100")
    if max_ms is not None and not 0 < max_ms < float("inf"):
        raise MsltError(f"--max-ms {max_ms}: give milliseconds, more than 0")
    from dataclasses import asdict

    from mslt.cli.progress import counted
    from mslt.evaluate.exit_bench import seconds_a_row, seconds_to_exits
    from mslt.evaluate.exit_sweep import Clock, as_plain
    from mslt.evaluate.exit_sweep import calibrate as choose
    from mslt.evaluate.exits import origin
    from mslt.files import write_json

    opened, rows, split = _open(folder, task, data_dir, split, subset, max_rows)
    kept = _kept(opened, rows)
    share = None if max_drop is None else max_drop / 100
    if max_ms is None:
        chosen = choose(kept, share, None, None, per_layer, by, seed)
    else:
        with counted("turns") as progress:
            clock = Clock(
                seconds_to_exits(opened, rows[:64]),
                lambda rule, numbers: seconds_a_row(opened, [rows[n] for n in numbers], rule, progress),
            )
            chosen = choose(kept, None, max_ms / 1e3, clock, per_layer, by, seed)
    settings = {"max_drop": max_drop, "max_ms": max_ms, "by": by, "per_layer": per_layer, "seed": seed, "split": split,
                "subset": subset, "max_rows": max_rows}  # fmt: skip
    found = {**asdict(chosen), "rule": as_plain(chosen.rule), "metric": opened.metric,
             **origin(opened, rows, settings)}  # fmt: skip
    write_json(folder / CALIBRATION, found)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    low, high = chosen.drop_interval
    typer.echo(
        f"{folder}: {chosen.rule}, chosen on {chosen.num_chosen_on:,} rows; on the {chosen.num_heldout:,} others"
    )
    typer.echo(f"  {opened.metric} falls by {100 * chosen.drop:.2f} points (95 %: {100 * low:.2f} to {100 * high:.2f})")
    low, high = chosen.saving_interval
    typer.echo(f"  {chosen.saving:.1%} of the layers saved (95 %: {low:.1%} to {high:.1%})")
    if chosen.measured_s is not None and chosen.predicted_s is not None and chosen.predicted_interval is not None:
        low, high = chosen.predicted_interval
        typer.echo(f"  {1e3 * chosen.measured_s:.2f} ms a row on its own, measured; predicted "
                   f"{1e3 * chosen.predicted_s:.2f} (95 %: {1e3 * low:.2f} to {1e3 * high:.2f})")  # fmt: skip


@app.command(
    "export",
    short_help="Write ONNX or torch.export, a graph a layer.",
    epilog="Example: mslt exit export exits graphs --threshold 0.3",
)
def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    kind: Annotated[Literal["onnx", "torch"], typer.Option("--format", help="ONNX, or torch.export's.")] = "onnx",
    threshold: Threshold = None,
    patience: Patience = None,
    tolerance: Tolerance = None,
    task: TaskName = None,
    as_json: Json = False,
) -> None:
    """Write a graph for each layer with its exit, to be run one after the other while a row is not sure, and run them
    once beside the model: the same logits to 1e-5, the same exits."""
    from mslt.evaluate.exit_export import export as write
    from mslt.evaluate.exits import open_exits
    from mslt.evaluate.glue_data import Row

    _quiet()
    opened = open_exits(folder, task, "cpu")
    rule, _ = _rule(opened, threshold, patience, tolerance)
    _refuse_unfit(opened, rule)
    pair = "It was." if len(opened.task.columns) > 1 else None
    texts = ("A film that is good.", "Bad.", "It is neither of them, and nobody knows why it was made at all.")
    sample = opened.batch_of([Row(text, pair, None) for text in texts])
    difference = write(opened.exits, rule, sample, out, kind, opened.task.labels)
    opened.tokenizer.save_pretrained(out)
    found = {"out": str(out), "format": kind, "graphs": opened.exits.num_exits, "difference": difference}
    typer.echo(
        json.dumps(found, indent=2)
        if as_json
        else f"{out}: {opened.exits.num_exits} graphs, run once: logits within {difference:.1e} of ours, the same exits"
    )


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    getLogger("torch.onnx").setLevel("ERROR")  # of what it would need for images


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _refuse_idle(why: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise MsltError(f"{name} {value}: does nothing, {why}; leave it out")


def _opened(folder: Path, task: str | None) -> "Opened":
    from mslt.evaluate.exits import open_exits
    from mslt.evaluate.glue_tasks import TASKS

    _quiet()
    if task is not None:
        refuse_unknown("--task", task, TASKS)
    return open_exits(folder, task, _device())


def _open(
    folder: Path, task: str | None, data_dir: Path | None, split: str | None, subset: bool, max_rows: int | None
) -> "tuple[Opened, list[Row], str]":
    """With the rows the name of their split, of MNLI's the matched."""
    from mslt.evaluate.exits import heldout

    opened = _opened(folder, task)
    name = split or opened.task.validation[0]
    return opened, heldout(opened.task, data_dir, subset, name)[:max_rows], name


def _rule(
    opened: "Opened", thresholds: list[float] | None, patience: int | None, tolerance: float | None
) -> "tuple[ExitRule, dict[str, Any] | None]":
    """The one that is given; else the one that was calibrated, with all that was then found."""
    from mslt.evaluate.exit_sweep import from_plain
    from mslt.heads.exit_rule import by_entropy, by_patience

    if thresholds and patience is not None:
        raise MsltError("--threshold, --patience: rows leave by one of them; give one")
    if patience is not None:
        return by_patience(patience, tolerance), None
    _refuse_idle("it is for --patience", {"--tolerance": tolerance})
    if thresholds:
        return by_entropy(thresholds), None
    path = opened.folder / CALIBRATION
    if not path.is_file():
        raise MsltError(
            f"{opened.folder}: no rule is given; give --threshold or --patience, or let `mslt exit calibrate` choose"
        )
    found = _found_by("calibrate", path, opened)
    return from_plain(found["rule"]), found


def _found_by(verb: str, path: Path, opened: "Opened") -> dict[str, Any]:
    """What a command has left of these exits. MsltError where it is damaged, or of others."""
    from mslt.evaluate.exits import identity
    from mslt.evaluate.result import refused_if_damaged

    remedy = f"run `mslt exit {verb}` again, or move it away"
    with refused_if_damaged(path, remedy):
        found = json.loads(path.read_text())
        others = [name for name, own in identity(opened).items() if found[name] != own]
    if others:
        raise MsltError(f"{path}: is of other exits than are here ({', '.join(others)}); {remedy}")
    return found


def _refuse_unfit(opened: "Opened", rule: "ExitRule") -> None:
    from mslt.heads.exit_rule import refuse_unfit

    refuse_unfit(rule, opened.exits.num_exits, opened.exits.is_regression)


def _kept(opened: "Opened", rows: "list[Row]") -> "Kept":
    from mslt.cli.progress import counted_parts
    from mslt.evaluate.exit_sweep import keep
    from mslt.evaluate.exits import exit_logits_of

    with counted_parts() as tell:
        return keep(opened, rows, exit_logits_of(opened.exits, rows, opened.batch_of, tell))
