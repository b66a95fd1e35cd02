"""`mslt probe`: what each layer knows."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mslt.cli.refusals import refuse_rate, refuse_unknown
from mslt.cli.tables import print_table
from mslt.errors import MsltError

if TYPE_CHECKING:
    from mslt.evaluate.senteval import Checkpoint
    from mslt.report.heatmap import HeatMap

app = typer.Typer(
    help="What each layer knows. Hidden state `emb` is the embedding output, 0 the output of layer 0.",
    no_args_is_help=True,
)

LAYERS = "hidden state: emb, then the output of layer 0, 1, …"
FROZEN = "in brackets: frozen in this stage"
UNSURE = "in brackets: its 95 % interval holds 0"
Checkpoints = Annotated[
    list[str],
    typer.Argument(metavar="CKPT…", help="Folders of checkpoints, of a run's stage or a run; or names on the hub."),
]
Stages = Annotated[bool, typer.Option("--stages", help="The arguments are runs: take every finished stage of each.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the results. Default: beside each checkpoint.", show_default=False)
]
Pool = Annotated[Literal["cls", "mean"], typer.Option(help="What of a sentence: the first token, or the mean of all.")]
Kind = Annotated[
    Literal["mlp", "logistic"],
    typer.Option(help="SentEval's search over L2 strengths, or the fast way: one logistic regression."),
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="Features as they are, as SentEval has them. Default: standardized (mean 0, deviation 1)."
    ),
]
MaxTokens = Annotated[int | None, typer.Option(min=4, help="Of a sentence.", show_default="128")]
Device = Annotated[str | None, typer.Option(help="Like cpu or cuda:1.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(
    "senteval",
    short_help="Probe every hidden state on SentEval's tasks.",
    epilog="Example: mslt probe senteval runs/bert-base --data-dir probing",
)
def senteval(
    checkpoints: Checkpoints,
    data_dir: Annotated[Path, typer.Option(help="Folder with files of SentEval's probing tasks.")],
    task: Annotated[
        list[str] | None, typer.Option(help="One, or several times. Default: all whose file is there.")
    ] = None,
    pooling: Pool = "cls",
    classifier: Kind = "mlp",
    raw: Raw = False,
    repetitions: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the probes, with other beginnings and orders; logistic has neither.", show_default="3"
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    max_train_rows: Annotated[
        int | None, typer.Option(min=2, help="Train on so many rows.", show_default=False)
    ] = None,
    stages: Stages = False,
    out: Out = None,
    keep_features: Annotated[
        bool, typer.Option("--keep-features", help="Leave the sentences' vectors on disk, for other classifiers.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the probes and the control's labels.")] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a probe on every hidden state at once, for each of SentEval's tasks, and print their accuracy, that on
    shuffled labels beside it. Writes a file for each task, a heat map of them (PNG, CSV), and goes on after a stop."""
    from mslt.cli.progress import counted_parts
    from mslt.evaluate.device import open_device
    from mslt.evaluate.probe_tasks import TASKS, present_tasks, read_rows
    from mslt.evaluate.senteval import REPETITIONS, Settings, checkpoints_of, plan_checkpoint, probe_checkpoint

    for name in task or ():
        refuse_unknown("--task", name, TASKS)
    if classifier == "logistic" and (repetitions or 1) > 1:
        raise MsltError(f"--repetitions {repetitions}: all would be the same with --classifier logistic; leave it out")
    tasks = list(dict.fromkeys(task)) if task else present_tasks(data_dir)
    settings = Settings(pooling, classifier, not raw, repetitions or REPETITIONS, max_tokens, max_train_rows, seed)
    _quiet()
    on = open_device(device)
    found: dict[str, list[dict[str, Any]]] = {}
    named = checkpoints_of(checkpoints, stages)
    data = {name: read_rows(data_dir / TASKS[name].file, max_train_rows) for name in tasks}
    all_planned = [plan_checkpoint(each, data, settings, each.folder(settings.name, out)) for each in named]
    for planned in all_planned:  # after all were looked at
        with counted_parts() as progress:
            results = probe_checkpoint(planned, data, on, progress, keep_features)
        found[planned.checkpoint.name] = results
        _finish_checkpoint(planned.checkpoint, settings.protocol, planned.folder, results, as_json)
    if as_json:
        typer.echo(json.dumps(_without_answers(found), indent=2))


def _finish_checkpoint(
    checkpoint: "Checkpoint", title: str, folder: Path, results: list[dict[str, Any]], as_json: bool
) -> None:
    """Print the table, and draw it."""
    from mslt.report.probing import best_layer, columns

    if not as_json:
        depth = max(len(result["accuracy"]) for result in results)
        rows = []
        for result in results:
            best = best_layer(result)
            cells = [f"{100 * share:.1f}" + ("*" if k == best else "") for k, share in enumerate(result["accuracy"])]
            rows.append([result["task"], f"{100 * result['majority']:.1f}", *cells])
            low, high = (100 * result[end][best] for end in ("low", "high"))
            rows.append(
                ["  control", f"±{(high - low) / 2:.1f}*", *(f"{100 * share:.1f}" for share in result["control"])]
            )
            rows.append(["  selectivity", "", *(f"{100 * share:.1f}" for share in result["selectivity"])])
        header = ["task", "commonest", *columns(depth)]
        print_table(header, rows, width=46 + 8 * depth, title=f"{checkpoint.name}: {title}, %, by hidden state")
        typer.echo("* the best by the dev rows, half of its 95 % interval; commonest: always the commonest label; "
                   "control: the same on shuffled labels; selectivity: accuracy minus the control's")  # fmt: skip
        cut = sum(result["num_cut"] for result in results)
        if cut:
            typer.echo(f"{cut:,} sentences were cut to {results[0]['settings']['max_tokens']} tokens")
    _draw(f"{checkpoint.name}: {title}, %", folder, results[0], as_json)


@app.command(
    "mlm",
    short_help="Can a word be read back from a layer?",
    epilog="Example: mslt probe mlm runs/bert-base --text passages.txt",
)
def mlm(
    checkpoints: Checkpoints,
    text: Annotated[
        list[Path], typer.Option(help="A text file, paragraphs between empty lines, or SQuAD's JSON; several times.")
    ],
    dropout: Annotated[
        list[float] | None,
        typer.Option(help="Probability that a part of a word's embedding is hidden; several times for a sweep. [0.3]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of training the heads.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of text at once.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=8, help="Of a window of text.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-3,
    mlm_head: Annotated[
        Literal["random", "pretrained"], typer.Option(help="What the heads begin from; the latter is the checkpoint's.")
    ] = "random",
    stages: Stages = False,
    out: Out = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the heads, of what is hidden and held out.")] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train an MLM head on every frozen hidden state, where words are half hidden, and print how often each reads the
    input word back from held-out text in which nothing is. Writes a file for each --dropout, a heat map (PNG, CSV)."""
    from mslt.cli.progress import counted_parts
    from mslt.evaluate.device import open_device
    from mslt.evaluate.mlm_probe import FOLDER, Settings, plan_mlm, probe_mlm
    from mslt.evaluate.passages import read_passages
    from mslt.evaluate.senteval import checkpoints_of
    from mslt.report.probing import columns

    for each in dropout or ():
        if not 0 <= each <= 1:
            raise MsltError(f"--dropout {each}: is a probability; give 0 to 1")
    refuse_rate("--learning-rate", learning_rate, "1e-3")
    _quiet()
    passages, on = read_passages(text), open_device(device)
    found: dict[str, list[dict[str, Any]]] = {}
    all_settings = [
        Settings(ratio, steps, batch_size, max_tokens, learning_rate, head=mlm_head, seed=seed)
        for ratio in dict.fromkeys(dropout or [0.3])
    ]
    all_planned = [
        (each, [plan_mlm(each.source, passages, settings, each.folder(FOLDER, out)) for settings in all_settings])
        for each in checkpoints_of(checkpoints, stages)
    ]
    for checkpoint, of_checkpoint in all_planned:  # after all were looked at
        folder, results = checkpoint.folder(FOLDER, out), []
        for planned in of_checkpoint:
            with counted_parts() as progress:
                tell = partial(progress, f"{checkpoint.name}, dropout {planned.settings.dropout:g}: steps")
                results.append(probe_mlm(planned, on, tell))
        found[checkpoint.name] = results
        title = f"{checkpoint.name}: input words read back, %"
        if not as_json:
            rows = [[each["task"], *(f"{100 * share:.1f}" for share in each["accuracy"])] for each in results]
            depth = len(results[0]["accuracy"])
            print_table(["", *columns(depth)], rows, width=46 + 8 * depth, title=title)
            typer.echo(f"{results[0]['tokens']:,} held-out tokens, of which the commonest is "
                       f"{results[0]['majority']:.1%}; {results[0]['trainable_per_layer']:,} trained parameters a "
                       "layer")  # fmt: skip
        _draw(title, folder, results[0], as_json)
    if as_json:
        typer.echo(json.dumps(_without_answers(found), indent=2))


@app.command(
    "make",
    short_help="Make probing tasks from any text.",
    epilog="Example: mslt probe make SentLen BigramShift --text book.txt --out probing",
)
def make(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK…", help="SentLen, WordContent, BigramShift.")],
    text: Annotated[
        list[Path],
        typer.Option(
            help="A text file of a language with spaces between its words, or Chinese or Japanese; or SQuAD's JSON; "
            "several times."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write SentEval's files into.")],
    one_per_line: Annotated[
        bool, typer.Option("--one-per-line", help="Each line is a sentence; else they are found as in English.")
    ] = False,
    rows: Annotated[int, typer.Option(min=24, help="Of a task at most; 10 of 12 to train on.")] = 12_000,
    words: Annotated[int, typer.Option(min=2, help="Of WordContent: how many are told apart.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of which sentences are taken, and how.")] = 0,
) -> None:
    """Make probing tasks that need no parser from text: how long a sentence is, which of some words it holds,
    whether two of its words changed places."""
    from data_prep.sentences import split_sentences
    from mslt.evaluate.passages import read_passages
    from mslt.evaluate.probe_make import MAKERS, make_rows
    from mslt.evaluate.probe_tasks import TASKS, write_rows

    for task in tasks:
        refuse_unknown("TASK", task, MAKERS)
    existing = [out / TASKS[task].file for task in tasks if (out / TASKS[task].file).exists()]
    if existing:
        raise MsltError(f"{existing[0]}: exists; give another --out")
    if one_per_line:
        sentences = [line for path in text for line in _lines(path)]
    else:
        sentences = [sentence for passage in read_passages(text) for sentence in split_sentences(passage)]
    made = {task: make_rows(task, sentences, rows, seed, words) for task in tasks}
    out.mkdir(parents=True, exist_ok=True)
    for task, lines in made.items():
        write_rows(out / TASKS[task].file, lines)
        typer.echo(f"{out / TASKS[task].file}: {len(lines):,} rows of {len({label for _, label, _ in lines})} labels, "
                   f"from {len(sentences):,} sentences")  # fmt: skip


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MsltError(f"--text {path}: not readable as UTF-8 ({error}); give a text file") from None


@app.command(
    "compare",
    short_help="Draw what one checkpoint knows beside another.",
    epilog="Example: mslt probe compare runs/bert-base-full runs/bert-base --stages --picture stages.png",
)
def compare(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="BASE CKPT…", help="Checkpoints that were probed; the first is what the others are held against."
        ),
    ],
    picture: Annotated[Path, typer.Option(help="PNG to draw; a CSV goes beside it.")],
    probe: Annotated[Literal["senteval", "mlm"], typer.Option(help="Which probe's results.")] = "senteval",
    pooling: Pool = "cls",
    classifier: Kind = "mlp",
    raw: Raw = False,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Accuracies, a map for each task, instead of differences.")
    ] = False,
    stages: Annotated[
        bool, typer.Option("--stages", help="The arguments are runs: every finished stage of each, side by side.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(help="Where --out of the probe was. Default: beside each.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """What the other checkpoints know more than the first, task by task and layer by layer, as after and before a
    fine-tuning (Figures 1 and 4); or all of them side by side (Figure 2), as the stages of runs."""
    from mslt.evaluate.opening import digest
    from mslt.evaluate.senteval import Settings, checkpoints_of
    from mslt.report import probing

    if picture.is_dir():
        raise MsltError(f"--picture {picture}: is a folder; name the file to write")
    kind = "mlm" if probe == "mlm" else Settings(pooling, classifier, not raw).name
    named = checkpoints_of(checkpoints, stages)
    found = [
        (
            each.label,
            probing.read_results(
                each.folder(kind, results), f"`mslt probe {probe}` on {each.source}", digest(each.source)
            ),
        )
        for each in named
    ]
    differs = not (stages or side_by_side)
    if not differs:
        maps = probing.side_by_side(dict(found), {each.label: each.num_frozen for each in named})
    elif len(found) < 2:
        raise MsltError(f"{checkpoints[0]}: there is nothing to hold it against; give another checkpoint, or "
                        "--side-by-side")  # fmt: skip
    else:
        maps = [probing.difference_map(each, found[0]) for each in found[1:]]
    bracketed = any(any(line) for each in maps for line in each.in_brackets or ())
    brackets = (UNSURE if differs else FROZEN) if bracketed else ""
    _write(maps, picture.parent, picture.stem, as_json, differs, brackets)
    if as_json:
        typer.echo(json.dumps([_plain(each) for each in maps], indent=2))
        return
    for each in maps:
        is_in = each.in_brackets or [[False] * len(line) for line in each.values]
        cells = [[row, *(_written(*cell, differs) for cell in zip(line, marks, strict=True))]
                 for row, line, marks in zip(each.rows, each.values, is_in, strict=True)]  # fmt: skip
        print_table(["", *each.columns], cells, width=46 + 8 * len(each.columns), title=each.title)
    if brackets:
        typer.echo(brackets)


def _without_answers(found: Any) -> Any:
    """Without what was `right`, row by row, which is for comparing files."""
    if isinstance(found, dict):
        return {name: _without_answers(value) for name, value in found.items() if name not in ("right", "asked")}
    return [_without_answers(each) for each in found] if isinstance(found, list) else found


def _written(value: float, in_brackets: bool, differs: bool) -> str:
    if value != value:
        return "–"
    text = f"{value:+.1f}" if differs else f"{value:.1f}"
    return f"({text})" if in_brackets else text


def _plain(drawn: "HeatMap") -> dict[str, Any]:
    """For JSON, which has no NaN."""
    from dataclasses import asdict

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return None if value != value else value

    return {name: plain(value) for name, value in asdict(drawn).items()}


@app.command(
    "tables",
    short_help="Print the paper's tables of surgery beside ours.",
    epilog="Example: mslt probe tables plain=plain drop=short-evaluation/glue-convexity",
)
def tables(
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD=FOLDER…",
            help="What `mslt evaluate glue --preset convexity` wrote: plain=…, multi-objective=…, extra-layer=…, "
            "copy=…, drop=….",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Surgery on layers and the second objective, fine-tuned: Tables 1 and 2 of the paper, ours above its rows."""
    from dataclasses import asdict

    from mslt.report.surgery import METHODS, VERDICT, read_methods, surgery_tables

    folders: dict[str, Path] = {}
    for written in methods or ():
        method, sign, folder = written.partition("=")
        refuse_unknown("METHOD", method, METHODS)
        if not sign or method in folders:
            raise MsltError(f"{written}: write METHOD=FOLDER, each method once")
        folders[method] = Path(folder)
    found = surgery_tables(read_methods(folders))
    if as_json:
        typer.echo(json.dumps({"tables": [asdict(table) for table in found], "verdict": VERDICT}, indent=2))
        return
    for table in found:
        rows = [
            [f"{name} ({whose})", *(str(scores[c]) if c in scores else "–" for c in table.columns)]
            for whose, name, scores in table.rows
        ]
        print_table(["", *table.columns], rows, title=f"{table.title}, validation, %")
    typer.echo(f"{VERDICT} Layers count from 0. Ours: mean ± standard deviation over the seeds of the best setting.")


def _draw(title: str, folder: Path, like: dict[str, Any], as_json: bool) -> None:
    """All results in the folder that are like this one, where another process may end at the same time."""
    from mslt.files import lock_alone
    from mslt.report.probing import accuracy_map, probed_alike

    with lock_alone(folder.parent / ".heatmap.lock", None):
        _write([accuracy_map(title, probed_alike(folder, like))], folder, "heatmap", as_json)


def _write(
    maps: "list[HeatMap]", folder: Path, stem: str, as_json: bool, diverging: bool = False, brackets: str = ""
) -> None:
    from mslt.report.heatmap import draw_heatmaps, write_heatmaps_csv

    draw_heatmaps(maps, folder / f"{stem}.png", f"{LAYERS}; {brackets}" if brackets else LAYERS, diverging)
    write_heatmaps_csv(maps, folder / f"{stem}.csv")
    typer.echo(f"heat map: {folder / stem}.png, .csv", err=as_json)


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
