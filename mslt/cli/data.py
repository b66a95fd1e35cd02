"""`mslt data`: text to token shards, and every byte of them checked."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mslt.errors import MsltError

app = typer.Typer(help="Text to token shards, and every byte of them checked.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("prepare")
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
    vocab_size: Annotated[int | None, typer.Option(help="With --text: size of the vocabulary to train.")] = None,
    validation_share: Annotated[float, typer.Option(help="With --text: share of the documents to hold out.")] = 0.1,
    as_json: AsJson = False,
) -> None:
    """Make a shard folder from a recipe: `mslt data prepare RECIPE OUT`, or `mslt data prepare --text DIR OUT`."""
    from data_prep.prepare import prepare
    from data_prep.recipe import DataRecipe
    from mslt.config import find_shipped
    from mslt.validation import read_yaml, validate

    sources: list[dict[str, str]] = [{"kind": "text", "path": str(folder)} for folder in text or []]
    if sources and len(places) == 1:
        values: dict[str, Any] = {"sources": sources, "validation_share": validation_share}
        values |= {"vocabulary": {"size": vocab_size}} if vocab_size is not None else {}
        recipe, out = validate(DataRecipe, values, "mslt data prepare --text"), Path(places[0])
    elif not sources and vocab_size is None and len(places) == 2:
        path, out = find_shipped("recipes", places[0], ".yaml"), Path(places[1])
        recipe = validate(DataRecipe, read_yaml(path), str(path))
    else:
        raise MsltError(
            "mslt data prepare: give either RECIPE OUT, or OUT with --text DIR (and --vocab-size); "
            f"given were {' '.join(places)}"
        )
    with progress_bar() as progress:
        manifest, is_new = prepare(recipe, out, progress)
    if as_json:
        values = {"folder": str(out), "made": is_new, "hash": manifest.hash, **manifest.model_dump(mode="json")}
        typer.echo(json.dumps(values, indent=2))
        return
    typer.echo(f"{out}: {'made' if is_new else 'already made from this recipe, nothing to do'}")
    for source in manifest.sources:
        typer.echo(f"  source      {source.kind} {source.path}: {source.documents:,} documents, {source.bytes:,} bytes")
    rules = manifest.rules
    typer.echo(f"  dropped     {rules.dropped_empty_documents:,} empty, {rules.dropped_short_documents:,} too short")
    for name, split in manifest.splits.items():
        typer.echo(
            f"  {name:<11} {split.documents:,} documents, {split.sentences:,} sentences, {split.tokens:,} tokens"
            f" in {len(split.shards)} shard{'s' * (len(split.shards) != 1)}"
        )
    typer.echo(f"  vocabulary  {manifest.tokenizer.vocab_size:,}")
    if manifest.unigram_entropy_nats is not None:
        typer.echo(f"  unigram entropy of validation: {manifest.unigram_entropy_nats:.4f} nats a token")


@app.command("verify")
def verify_command(folder: Annotated[Path, typer.Argument(help="The shard folder.")], as_json: AsJson = False) -> None:
    """Check every byte of a shard folder against its manifest."""
    from data_prep.verify import verify

    with progress_bar() as progress:
        summary = verify(folder, progress)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    typer.echo(f"{folder}: whole: {summary['shards']} shards, {summary['bytes']:,} bytes, all checksums right")


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr where that is a terminal; yields the function that long work calls."""
    from rich.console import Console
    from rich.progress import Progress

    if not sys.stderr.isatty():
        yield lambda stage, done_bytes, total_bytes: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(stage: str, done_bytes: int, total_bytes: int) -> None:
            bar.update(task, description=stage, completed=done_bytes, total=total_bytes or None)

        yield show
