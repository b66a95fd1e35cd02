"""`mslt pool`: small heads on all hidden states of a frozen encoder."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from mslt.cli.evaluate_squad import read_questions
from mslt.cli.progress import counted_parts
from mslt.cli.refusals import refuse_rate, refuse_unknown
from mslt.cli.tables import print_table
from mslt.errors import MsltError
from mslt.files import lock_alone

if TYPE_CHECKING:
    from mslt.evaluate.pool import Backbone
    from mslt.evaluate.pool_data import PoolTask
    from mslt.evaluate.pool_runs import CacheOptions

LOCK = ".lock"
MAX_SEED = 2**63 - 1  # keys are of 64 bits; more seeds are counted from the first

app = typer.Typer(
    help="Pooling: one small head on all hidden states of a frozen encoder, a file of its own for each task.",
    no_args_is_help=True,
)

Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="BERT, RoBERTa or ELECTRA: a folder (RUN/stage-N/model), or a hub's name.")
]
Folders = Annotated[list[Path], typer.Argument(metavar="HEAD…", help="Folders that `mslt pool train` wrote.")]
Tasks = Annotated[list[str], typer.Option("--task", help="Of GLUE, like SST-2, or SQuAD; several times for several.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder with GLUE's own files. Default: from the hub.", show_default=False)
]
SquadTrain = Annotated[
    Path | None, typer.Option(help="SQuAD's own JSON to train on. Default: from the hub.", show_default=False)
]
SquadDev = Annotated[
    Path | None, typer.Option(help="SQuAD's own JSON to score on. Default: from the hub.", show_default=False)
]
Version = Annotated[Literal["1.1", "2.0"], typer.Option(help="Of SQuAD.")]
Stride = Annotated[int, typer.Option(min=1, help="SQuAD: tokens from a window's beginning to the next one's.")]
QuestionTokens = Annotated[int, typer.Option(min=1, help="SQuAD: tokens of a question that are kept.")]
Subset = Annotated[bool, typer.Option("--subset", help="The files hold a part of the task; do not count rows.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=8, help="Of a row. Default: BERTVision's, 128, of RTE 250, of SQuAD 384.", show_default=False),
]
MaxTrainRows = Annotated[
    int | None, typer.Option(min=1, help="Train on so many; of SQuAD questions.", show_default=False)
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or hub name. Default: the checkpoint's own.", show_default=False)
]
Layers = Annotated[
    str,
    typer.Option(help="Hidden states that heads read: all, or i:j with both ends. 0 are the embeddings; layers above "
                 "j never run."),
]  # fmt: skip
TokensOption = Annotated[
    Literal["flatten", "attention", "first"],
    typer.Option(help="How tokens are joined: side by side (the paper's), by attention (rows of any length), or [CLS] "
                 "alone. SQuAD answers for each."),
]  # fmt: skip
Pads = Annotated[
    Literal["zero", "keep"],
    typer.Option(help="Padding's states: left out, or read like any token, as the paper's code does."),
]
Skip = Annotated[bool, typer.Option("--skip", help="SQuAD: the last hidden state beside the features.")]
Precision = Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of matrix products.")]
Cache = Annotated[
    Path | None, typer.Option(help="Folder for hidden states of the training rows. Default: none.", show_default=False)
]
CacheDtype = Annotated[Literal["bf16", "fp32"], typer.Option(help="Of the cache.")]
MaxCacheGb = Annotated[float, typer.Option(help="Refuse a larger cache of a task (10⁹ bytes).")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 … Default: cuda if there is one.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(
    "train",
    short_help="Train heads on a frozen encoder.",
    epilog="Example: mslt pool train runs/bert-base --task MRPC --task RTE --out heads",
)
def train(
    checkpoint: Checkpoint,
    task: Tasks,
    out: Annotated[Path, typer.Option(help="Folder to write: one below it for each head.")],
    pooler: Annotated[
        list[str] | None,
        typer.Option(
            help="How hidden states are joined: adapter, unshared, mix, mean or last; several times for several. "
            "Default: adapter.",
            show_default=False,
        ),
    ] = None,
    adapter_width: Annotated[
        list[int] | None,
        typer.Option(
            help="A of the projection; several times for several; 0 for none. Default: 16.", show_default=False
        ),
    ] = None,
    layers: Layers = "all",
    tokens: TokensOption = "flatten",
    pad_states: Pads = "zero",
    skip: Skip = False,
    learning_rate: Annotated[float, typer.Option(help="Of heads.")] = 5e-4,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    epochs: Annotated[int, typer.Option(min=1, help="Of heads.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="How many heads of each kind.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="The first of them.")] = 0,
    backbone_epochs: Annotated[
        str | None,
        typer.Option(
            help="Fine-tune the encoder on the task first, for so many epochs; several by commas, as in "
            "0.1,0.5,1,2, for Figure 1. Default: not at all.",
            show_default=False,
        ),
    ] = None,
    backbone_learning_rate: Annotated[float, typer.Option(help="With --backbone-epochs.")] = 2e-5,
    backbone_batch_size: Annotated[int, typer.Option(min=1, help="With --backbone-epochs.")] = 32,
    new_pooler: Annotated[
        bool, typer.Option("--new-pooler", help="With --backbone-epochs: draw the pooler where CKPT has none.")
    ] = False,
    data_dir: Data = None,
    squad_train: SquadTrain = None,
    squad_dev: SquadDev = None,
    version: Version = "2.0",
    stride: Stride = 128,
    question_tokens: QuestionTokens = 64,
    subset: Subset = False,
    max_tokens: MaxTokens = None,
    max_train_rows: MaxTrainRows = None,
    tokenizer: Tokenizer = None,
    precision: Precision = "fp32",
    cache: Cache = None,
    cache_dtype: CacheDtype = "bf16",
    max_cache_gb: MaxCacheGb = 10.0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train heads on the frozen encoder of any checkpoint, those of a task in one pass, and score them on its
    validation split. With --backbone-epochs the encoder is fine-tuned on the task first, and a figure shows its own
    score beside the heads'; these points are not done twice."""
    from mslt.evaluate.fine_tune import FineTuning
    from mslt.evaluate.pool_runs import BackboneTraining, Heads, curve, make_heads
    from mslt.heads.pooling import POOLERS, Pooler
    from mslt.report.pooling import draw_curve

    for name in pooler or ():
        refuse_unknown("--pooler", name, POOLERS)
    refuse_rate("--learning-rate", learning_rate, "5e-4")
    refuse_rate("--backbone-learning-rate", backbone_learning_rate, "2e-5")
    numbers = _epochs(backbone_epochs)
    if cache is not None and numbers:
        raise MsltError("--cache: holds the states of one encoder, --backbone-epochs makes others; leave one out")
    if numbers is None:
        _refuse_full(out)
    heads = Heads(
        training=FineTuning(learning_rate, batch_size, epochs, seed, precision=precision),
        poolers=cast(tuple[Pooler, ...], tuple(dict.fromkeys(pooler or ["adapter"]))),
        adapter_widths=tuple(dict.fromkeys(adapter_width or [16])),
        layers=layers,
        tokens=tokens,
        pad_states=pad_states,
        skip=skip,
        seeds=tuple(range(seed, seed + seeds)),
    )
    backbone, pool_tasks = _open(checkpoint, task, tokenizer, device, data_dir, squad_train, squad_dev, version, stride,
                                 question_tokens, subset, max_tokens, max_train_rows)  # fmt: skip
    for each in pool_tasks:
        heads.settings(each, backbone)  # its mistakes, now
    if numbers:
        tuning = BackboneTraining(
            tuple(numbers), FineTuning(backbone_learning_rate, backbone_batch_size, 1, seed, precision=precision),
            new_pooler,
        )  # fmt: skip
        with counted_parts() as progress:
            points = [
                point
                for each in pool_tasks
                for point in curve(backbone.source, each, heads, tuning, backbone, out, str(backbone.model.device),
                                   _tell, progress)
            ]  # fmt: skip
        if len(points) > len(pool_tasks):
            draw_curve(points, out / "figure-1.png")
        if as_json:
            typer.echo(json.dumps(points, indent=2))
        else:
            _print_heads([head for point in points for head in point["heads"]])
            for point in points:
                typer.echo(
                    f"{point['task']}, {point['epochs']:g} epochs: fine-tuned {100 * point['whole_headline']:.1f}"
                )
        return
    made = []
    out.mkdir(parents=True, exist_ok=True)
    busy = f"{out}: another process trains there; name another"
    with lock_alone(out / LOCK, busy), counted_parts() as progress:
        _refuse_full(out)
        for each in pool_tasks:
            made += make_heads(backbone, each, heads, out, _cache(cache, cache_dtype, max_cache_gb), progress)
    if as_json:
        typer.echo(json.dumps(made, indent=2))
    else:
        _print_heads(made)


@app.command(
    "eval",
    short_help="Score heads; show what each layer is worth.",
    epilog="Example: mslt pool eval heads/RTE-adapter-16-seed-0 --importance states.png",
)
def evaluate(
    heads: Folders,
    checkpoint: Annotated[
        str | None, typer.Option(help="The encoder. Default: where it was.", show_default=False)
    ] = None,
    importance: Annotated[
        Path | None,
        typer.Option(
            help="Picture (PNG) of what each hidden state is worth: weights, and the loss without it.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Answer on this instead, all heads in one pass of the encoder.", show_default=False),
    ] = None,
    pair: Annotated[str | None, typer.Option(help="The text's second sentence.", show_default=False)] = None,
    data_dir: Data = None,
    squad_dev: SquadDev = None,
    subset: Subset = False,
    tokenizer: Tokenizer = None,
    precision: Precision = "fp32",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Score heads of one encoder on the validation splits of their tasks; those of a task share every pass. Or let all
    of them answer on a text of yours, in one pass."""
    from mslt.evaluate.pool import Pooled, answers_on, open_heads, refuse_one_state, score_heads
    from mslt.evaluate.pool import importance as importance_of
    from mslt.report.pooling import draw_importance

    if pair is not None and text is None:
        raise MsltError("--pair: is the second sentence of --text; give both")
    _quiet()
    backbone, opened = open_heads(heads, _device(device), checkpoint, tokenizer)
    if text is not None:
        said = answers_on(backbone, opened, text, pair)
        if as_json:
            typer.echo(json.dumps(said, indent=2))
        else:
            print_table(["head", "task", "answer", "of all"], [
                [each["folder"], each["task"], each["answer"],
                 ", ".join(f"{label} {share:.1%}" for label, share in each["shares"].items())]
                for each in said
            ])  # fmt: skip
        return
    for each in opened if importance is not None else ():
        refuse_one_state(each.head.settings)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, each in enumerate(opened):
        key = (each.described["task"], each.described["max_tokens"], each.head.settings.pad_states,
               json.dumps(each.described.get("reading", {}), sort_keys=True))  # fmt: skip
        groups.setdefault(key, []).append(index)
    found: list[dict[str, Any]] = [{} for _ in opened]
    for (name, num_tokens, pads, reading), indices in groups.items():
        more = {"version": "2.0", "stride": 128, "question_tokens": 64, **json.loads(reading)}
        task = _task(name, backbone, data_dir, None, squad_dev, more["version"], more["stride"],
                     more["question_tokens"], subset, num_tokens, None, with_train=False)  # fmt: skip
        whole = Pooled(backbone.model, [opened[index].head for index in indices])
        scores = score_heads(whole, task, backbone.collate(task, pads == "keep"), precision)
        for index, by_split in zip(indices, scores, strict=True):
            own = opened[index]
            if by_split is None:
                raise MsltError(f"{own.folder}: its logits are not finite; leave it out, or train it again")
            found[index] = {
                "folder": str(own.folder), "task": name, "metric": task.metric, "scores": by_split,
                "headline": task.headline(by_split), "sizes": own.described["sizes"],
                "settings": own.described["settings"], "training": own.described["training"],
                "speedup_of_layers": own.described.get("speedup_of_layers"),
            }  # fmt: skip
            if importance is not None:
                found[index]["importance"] = importance_of(backbone, own.head, task)
    if importance is not None:
        draw_importance(found, importance)
        typer.echo(f"picture: {importance}", err=as_json)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print_heads(found)


@app.command(
    "search",
    short_help="Search each method's settings, budgets equal.",
    epilog="Example: mslt pool search runs/bert-base --task RTE --trials 100 --out search",
)
def search(
    checkpoint: Checkpoint,
    task: Tasks,
    out: Annotated[Path, typer.Option(help="Folder of the results, one below it for each task.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="adapter, unshared, mix, mean or last; probe (a linear layer on [CLS]) or full (fine-tuning of the "
            "whole model); several times for several. Default: adapter, last, probe, full.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Of each method.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="With which each method's best setting is trained anew.")] = 5,
    choose_share: Annotated[float, typer.Option(help="Of the training rows, set aside to choose settings by.")] = 0.1,
    layers: Layers = "all",
    tokens: TokensOption = "flatten",
    pad_states: Pads = "zero",
    skip: Skip = False,
    epochs: Annotated[int, typer.Option(min=1, help="Of each trial.")] = 1,
    full_from: Annotated[
        str | None,
        typer.Option(help="What full fine-tuning begins from. Default: CKPT.", show_default=False),
    ] = None,
    new_pooler: Annotated[
        bool, typer.Option("--new-pooler", help="For full fine-tuning: draw the pooler where there is none.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the search: trials, rows set aside, final seeds.")
    ] = 0,
    data_dir: Data = None,
    squad_train: SquadTrain = None,
    squad_dev: SquadDev = None,
    version: Version = "2.0",
    stride: Stride = 128,
    question_tokens: QuestionTokens = 64,
    subset: Subset = False,
    max_tokens: MaxTokens = None,
    max_train_rows: MaxTrainRows = None,
    tokenizer: Tokenizer = None,
    precision: Precision = "fp32",
    cache: Cache = None,
    cache_dtype: CacheDtype = "bf16",
    max_cache_gb: MaxCacheGb = 10.0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Search each method's learning rate, batch and width with as many trials (optuna's TPE, poor ones pruned), on
    training rows set aside; then train the best with several seeds and score it on the validation split. Prints the
    paper's Tables 1 and 2 beside ours. What is done is not done again: the same command goes on after a stop."""
    from mslt.evaluate.opening import locate
    from mslt.evaluate.pool_search import DEFAULT_METHODS, METHODS, Search, run_search

    methods = tuple(dict.fromkeys(method or DEFAULT_METHODS))
    for name in methods:
        refuse_unknown("--method", name, METHODS)
    if not 0 < choose_share < 1:
        raise MsltError(f"--choose-share {choose_share:g}: is a share; give more than 0 and less than 1")
    whole = None if full_from is None else locate(full_from)[0]
    backbone, pool_tasks = _open(checkpoint, task, tokenizer, device, data_dir, squad_train, squad_dev, version, stride,
                                 question_tokens, subset, max_tokens, max_train_rows)  # fmt: skip
    options = Search(methods, trials, seeds, epochs, layers, tokens, pad_states, skip, choose_share, seed, precision,
                     whole, new_pooler)  # fmt: skip
    found = []
    with counted_parts() as progress:
        for each in pool_tasks:
            kept = _cache(cache, cache_dtype, max_cache_gb)
            found.append(run_search(backbone, each, options, out / each.name, kept, _tell, progress))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print_search(found)
        typer.echo(", ".join(str(out / each.name / "results.json") for each in pool_tasks))


@app.command(
    "cache",
    short_help="Write hidden states of training rows to disk.",
    epilog="Example: mslt pool cache runs/bert-base --task RTE --out cache",
)
def cache_states(
    checkpoint: Checkpoint,
    task: Tasks,
    out: Annotated[Path, typer.Option(help="Folder, one below it for each task: what --cache of the others takes.")],
    layers: Layers = "all",
    pad_states: Pads = "zero",
    cache_dtype: CacheDtype = "bf16",
    max_cache_gb: MaxCacheGb = 10.0,
    data_dir: Data = None,
    squad_train: SquadTrain = None,
    squad_dev: SquadDev = None,
    version: Version = "2.0",
    stride: Stride = 128,
    question_tokens: QuestionTokens = 64,
    subset: Subset = False,
    max_tokens: MaxTokens = None,
    max_train_rows: MaxTrainRows = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write the hidden states of the training rows, without padding and in bf16, once for all heads that are trained on
    them. Says first how large that is; refuses above --max-cache-gb. Goes on where it was stopped."""
    from mslt.evaluate.pool import states_of
    from mslt.evaluate.pool_cache import cache_bytes, make_cache, refuse_too_large

    backbone, pool_tasks = _open(checkpoint, task, tokenizer, device, data_dir, squad_train, squad_dev, version, stride,
                                 question_tokens, subset, max_tokens, max_train_rows)  # fmt: skip
    config = backbone.model.config
    first, last = states_of(layers, config.num_hidden_layers)
    states = range(first, last + 1)
    found = []
    for each in pool_tasks:
        collate = backbone.collate(each, pad_states == "keep")
        num_tokens = sum(collate.num_read(row) for row in each.train)
        num_bytes = cache_bytes(num_tokens, len(states), config.hidden_size, cache_dtype)
        refuse_too_large(num_bytes, max_cache_gb, f"{len(each.train):,} rows of {each.name}")
        found.append({"task": each.name, "rows": len(each.train), "tokens": num_tokens, "states": [first, last],
                      "bytes": num_bytes, "folder": str(out / each.name)})  # fmt: skip
        typer.echo(f"{each.name}: {len(each.train):,} rows, {num_tokens:,} tokens × {len(states)} hidden states × "
                   f"{config.hidden_size}, {cache_dtype}: {num_bytes / 1e9:.2f} GB", err=as_json)  # fmt: skip
    for each in pool_tasks:
        with counted_parts() as progress:
            make_cache(
                out / each.name, backbone.model, backbone.described["backbone_sha256"], each.train,
                backbone.collate(each, pad_states == "keep"), states, cache_dtype, max_cache_gb,
                lambda done, total, name=each.name: progress(f"hidden states of {name}", done, total),  # type: ignore[misc]
            )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo(f"{out}: written; give it to `mslt pool train` and `search` as --cache")


@app.command(
    "errors",
    short_help="Show where heads are right and wrong.",
    epilog="Example: mslt pool errors heads/RTE-adapter-16-seed-0 heads/RTE-mix-16-seed-0",
)
def errors(
    first: Annotated[Path, typer.Argument(metavar="A", help="A head's folder, or a fine-tuned classifier's.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    task: Annotated[str | None, typer.Option(help="Of GLUE. Default: the head's own.", show_default=False)] = None,
    data_dir: Data = None,
    split: Annotated[
        str | None, typer.Option(help="Default: the (first) validation split.", show_default=False)
    ] = None,
    subset: Subset = False,
    tokenizer: Tokenizer = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Where two of them are right and wrong on the same rows: the overlap of correct answers, positives predicted and
    found, negatives right."""
    from mslt.evaluate.glue_tasks import TASKS
    from mslt.evaluate.pool_errors import errors as compare

    if task is not None:
        refuse_unknown("--task", task, TASKS)
    _quiet()
    found = compare([first, second], task, data_dir, subset, split, _device(device), tokenizer)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return

    def percent(share: float | None) -> str:
        return "–" if share is None else f"{share:.1%}"

    names = {"right": "right", "predicted_positive": f"predicted positive ({found['positive']})",
             "recall": "positives found (recall)", "negatives_right": "negatives right"}  # fmt: skip
    (a, of_a), (b, of_b) = found["each"].items()
    rows = [[text, percent(of_a[name]), percent(of_b[name])] for name, text in names.items() if name in of_a]
    rows.append(["this one alone right", percent(found["first_alone_right"]), percent(found["second_alone_right"])])
    print_table(["", a, b], rows, title=f"{found['task']}, {found['split']}, {found['rows']:,} rows")
    typer.echo(f"both right {percent(found['both_right'])}, neither {percent(found['neither_right'])}; of what one of "
               f"them gets right, both do {percent(found['both_of_either'])}")  # fmt: skip


def _refuse_full(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(each.name != LOCK for each in out.iterdir())):
        raise MsltError(f"{out}: is there, and no empty folder; name another")


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _tell(line: str) -> None:
    print(f"pool: {line}", file=sys.stderr, flush=True)


def _device(name: str | None) -> str:
    from mslt.evaluate.device import open_device

    return str(open_device(name))


def _epochs(written: str | None) -> list[float] | None:
    if written is None:
        return None
    try:
        return list(dict.fromkeys(float(each) for each in written.split(",")))
    except ValueError:
        raise MsltError(f"--backbone-epochs {written}: give numbers apart by commas, like 0.1,0.5,1,2") from None


def _cache(folder: Path | None, dtype: str, max_gb: float) -> "CacheOptions | None":
    from mslt.evaluate.pool_runs import CacheOptions

    return None if folder is None else CacheOptions(folder, dtype, max_gb)


def _open(
    checkpoint: str, names: list[str], tokenizer: str | None, device: str | None, data_dir: Path | None,
    squad_train: Path | None, squad_dev: Path | None, version: Any, stride: int, question_tokens: int, subset: bool,
    max_tokens: int | None, max_train_rows: int | None,
) -> "tuple[Backbone, list[PoolTask]]":  # fmt: skip
    """The encoder and its tasks, read whole before anything is trained."""
    from mslt.evaluate.glue_tasks import TASKS
    from mslt.evaluate.opening import locate
    from mslt.evaluate.pool import open_backbone
    from mslt.evaluate.pool_data import SQUAD

    for name in names:
        refuse_unknown("--task", name, [*TASKS, SQUAD])
    if (squad_train is None) != (squad_dev is None):
        raise MsltError("--squad-train and --squad-dev: give both, or neither to read SQuAD from the hub")
    _quiet()
    source, _ = locate(checkpoint)
    backbone = open_backbone(source, tokenizer, _device(device))
    tasks = [
        _task(name, backbone, data_dir, squad_train, squad_dev, version, stride, question_tokens, subset, max_tokens,
              max_train_rows)
        for name in dict.fromkeys(names)
    ]  # fmt: skip
    return backbone, tasks


def _task(
    name: str, backbone: "Backbone", data_dir: Path | None, squad_train: Path | None, squad_dev: Path | None,
    version: Any, stride: int, question_tokens: int, subset: bool, max_tokens: int | None, max_train_rows: int | None,
    with_train: bool = True,
) -> "PoolTask":  # fmt: skip
    from mslt.evaluate.glue import Source
    from mslt.evaluate.glue_tasks import PRESETS
    from mslt.evaluate.pool import refuse_long
    from mslt.evaluate.pool_data import SQUAD, SquadFiles, glue_task, squad_task
    from mslt.evaluate.squad import Shape, frame_of, refuse_narrow

    if name == SQUAD:
        shape = Shape(max_tokens or 384, stride, question_tokens)
        refuse_long(shape.sequence_length, backbone.source)
        refuse_narrow(shape, frame_of(backbone.tokenizer))
        train = read_questions(squad_train, version, "train", subset) if with_train else []
        dev = read_questions(squad_dev, version, "dev", subset)
        return squad_task(SquadFiles(train, dev, version, max_train_rows), backbone.tokenizer, shape)
    num_tokens = max_tokens or PRESETS["bertvision"].tokens.get(name, 128)
    refuse_long(num_tokens, backbone.source)
    source = Source(backbone.source, None, data_dir, subset, max_train_rows)
    return glue_task(source, name, backbone.tokenizer, num_tokens, with_train)


def _print_search(found: list[dict[str, Any]]) -> None:
    from mslt.report.pooling import compression_rows, score_table, size_rows

    header, rows = score_table(found)
    print_table(header, rows, title="validation splits, percent, mean ± deviation over seeds (BERTVision's Table 1)")
    print_table(["", "parameters trained", "smaller", "deployed", "a further task", "training"], size_rows(found),
                title="the four numbers, and the seconds of one training")  # fmt: skip
    print_table(["", "what is trained is smaller", "deployed", "of full fine-tuning's score"], compression_rows(found),
                title="BERTVision's Table 2; the encoder is not in its ratio, and has to run")  # fmt: skip


def _print_heads(made: list[dict[str, Any]]) -> None:
    """The four numbers always together."""
    rows = []
    for head in made:
        settings, sizes = head["settings"], head["sizes"]
        states = f"{settings['first_state']}:{settings['last_state']}"
        faster = head.get("speedup_of_layers")
        rows.append([
            head["folder"], states + (f" ({faster:.2f}× as fast as all)" if faster else ""),
            f"{head['metric']} {100 * head['headline']:.1f}", f"{sizes['head']:,}", f"{sizes['ratio']:,.0f}×",
            f"{sizes['deployed']:,} ({sizes['deployed'] / sizes['whole']:.1%})", f"{sizes['task_bytes'] / 1e6:.2f} MB",
        ])  # fmt: skip
    header = ["head", "hidden states", "score", "parameters", "smaller", "deployed, with the encoder",
              "a further task"]  # fmt: skip
    print_table(header, rows, width=150)
