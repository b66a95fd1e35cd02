"""`mslt data`: text to token shards, every byte of them checked, and a look inside."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mslt.errors import MsltError

if TYPE_CHECKING:
    from mslt.data.loader import Samples
    from mslt.data.manifest import Amount

app = typer.Typer(help="Text to token shards, every byte of them checked, and a look inside.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[Path, typer.Argument(help="The shard folder.")]
Split = Annotated[Literal["train", "validation"], typer.Option()]
TrainingRecipe = Annotated[
    str, typer.Option(help="Training recipe whose sequence length, masks and seed are taken: a name or a path.")
]


@app.command(
    "prepare", short_help="Make a shard folder from text.", epilog="Example: mslt data prepare data.yaml data/shards"
)
def prepare_command(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[RECIPE] OUT",
            help="Path of a data recipe (*.yaml) or the name of one shipped with mslt, and the shard folder to make.",
        ),
    ],
    text: Annotated[
        list[Path] | None, typer.Option(help="Instead of a recipe: a folder of .txt, .md and .rst.")
    ] = None,
    hub: Annotated[
        str | None, typer.Option(help="Instead of a recipe: a dataset on the Hugging Face hub, or a folder of one.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="With --hub: the dataset's configuration.")] = None,
    column: Annotated[str | None, typer.Option(help="With --hub: the column of the text; by default text.")] = None,
    limit: Annotated[int | None, typer.Option(help="With --hub: read this many documents at most.")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="With --text or --hub: size of the vocabulary to train; by default 30,522.")
    ] = None,
    validation_share: Annotated[
        float | None, typer.Option(help="With --text or --hub: share of the documents to hold out; by default 0.02.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one for each core.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a shard folder: `mslt data prepare RECIPE OUT`, or with --text DIR or --hub NAME instead of a recipe.

    The recipe data-wikipedia-books, shipped with mslt, lists every key there is. Killed at any moment, the same command
    goes on where it stopped; what is half done lies in OUT.work."""
    from data_prep.prepare import prepare
    from data_prep.recipe import DataRecipe
    from mslt.config import find_shipped
    from mslt.validation import read_yaml, validate

    of_hub = given(config=config, column=column, max_documents=limit)
    of_corpus = given(vocabulary=given(size=vocab_size) or None, validation_share=validation_share)
    sources: list[dict[str, Any]] = [{"kind": "text", "path": str(folder)} for folder in text or []]
    sources += [{"kind": "hub", "dataset": hub, **of_hub}] if hub is not None else []
    if len(places) != (1 if sources else 2) or (of_hub and hub is None) or (of_corpus and not sources):
        raise MsltError(
            "mslt data prepare: give RECIPE OUT and no other option; or OUT with --text DIR or --hub NAME, where "
            "--config, --column and --limit belong to --hub"
        )
    out = Path(places[-1])
    if sources:
        recipe = validate(DataRecipe, {"sources": sources, **of_corpus}, "mslt data prepare")
    else:
        path = find_shipped("recipes", places[0], ".yaml")
        recipe = validate(DataRecipe, read_yaml(path), str(path))
    with progress_bar() as progress:
        manifest, is_new = prepare(recipe, out, progress, workers or len(os.sched_getaffinity(0)))
    if as_json:
        values = {"folder": str(out), "made": is_new, "hash": manifest.hash, **manifest.model_dump(mode="json")}
        typer.echo(json.dumps(values, indent=2))
        return
    typer.echo(f"{out}: {'made' if is_new else 'already made from this recipe, nothing to do'}")
    for source in manifest.sources:
        typer.echo(f"  {source.kind} {source.path}: {amount(source.read)} in {source.files:,} files")
        for rule, dropped in source.dropped.items():
            typer.echo(f"    {rule.replace('_', ' '):<16} {amount(dropped)}")
        typer.echo(f"    {'kept':<16} {amount(source.kept)}")
    for name, split in manifest.splits.items():
        typer.echo(
            f"  {name:<11} {split.documents:,} documents, {split.sentences:,} sentences, {split.tokens:,} tokens"
            f" in {len(split.shards)} shard{'s' * (len(split.shards) != 1)}"
        )
    typer.echo(f"  vocabulary  {manifest.tokenizer.vocab_size:,}")
    if manifest.unigram_entropy_nats is not None:
        typer.echo(f"  unigram entropy of validation: {manifest.unigram_entropy_nats:.4f} nats a token")


@app.command("verify", short_help="Check every byte of a shard folder.", epilog="Example: mslt data verify data/shards")
def verify_command(folder: Folder, as_json: AsJson = False) -> None:
    """Check every byte of a shard folder against its manifest."""
    from data_prep.verify import verify

    with progress_bar() as progress:
        summary = verify(folder, progress)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    typer.echo(f"{folder}: whole: {summary['shards']} shards, {summary['bytes']:,} bytes, all checksums right")
    for split in ("train", "validation"):
        counts = summary[split]
        typer.echo(f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, for example")
        for example in counts["examples"]:
            typer.echo(f"  {example} …")


@app.command(
    "show", short_help="Show one sample, its masks marked.", epilog="Example: mslt data show data/shards --sample 17"
)
def show_command(
    folder: Folder,
    sample: Annotated[int, typer.Option(min=0, max=10**10, help="Position in the data, counted from 0.")] = 0,
    split: Split = "train",
    recipe: TrainingRecipe = "bert-base",
    as_json: AsJson = False,
) -> None:
    """Show one sample as training by a recipe sees it, with its masks marked."""
    from mslt.data.inspection import describe_sample, render_sample

    described = describe_sample(open_samples(folder, split, recipe), sample)
    typer.echo(json.dumps(described, indent=2) if as_json else render_sample(described))


@app.command(
    "stats", short_help="Show lengths, padding and frequent tokens.", epilog="Example: mslt data stats data/shards"
)
def stats_command(
    folder: Folder, split: Split = "train", recipe: TrainingRecipe = "bert-base", as_json: AsJson = False
) -> None:
    """Show what a split looks like, and check its first samples against the rules of pairs and masks."""
    from mslt.data.inspection import describe_corpus, render_corpus

    described = describe_corpus(open_samples(folder, split, recipe))
    typer.echo(json.dumps(described, indent=2) if as_json else render_corpus(described))


def open_samples(folder: Path, split: str, recipe: str) -> "Samples":
    from mslt.config import load_recipe
    from mslt.data.loader import Samples
    from mslt.data.shards import open_shards

    loaded = load_recipe(recipe)
    return Samples(open_shards(folder, split), loaded.data, loaded.training.sequence_length, loaded.training.seed)


def given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def amount(amount: "Amount") -> str:
    return f"{amount.documents:,} documents, {amount.bytes:,} bytes"


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr where that is a terminal; yields the function that long work calls."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    if not sys.stderr.isatty():
        yield lambda stage, done_bytes, total_bytes: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(stage: str, done_bytes: int, total_bytes: int) -> None:
            bar.update(task, description=stage, completed=done_bytes, total=total_bytes or None)

        yield show
