"""`mslt attention`: where the heads of encoders look, and how alike their layers are."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mslt.cli.tables import print_table
from mslt.errors import MsltError

if TYPE_CHECKING:
    from mslt.evaluate.attention import Encoder, Likeness, TextMaps

MAX_SENTENCES, BATCH_SIZE = 500, 16


def attention(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT[@LAYERS]…",
            help="Folder of a checkpoint, a run's stage or a run (its last stage), or a hub's name; and which of its "
            "layers, from 0, ends included: @6-11 or @0,3,5-7. Default: all.",
        ),
    ],
    text: Annotated[
        str | None, typer.Option(help="A sentence: where each token looks in it.", show_default=False)
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="With --text: this head of every layer, from 0, or `all` of each in a row of its own. Default: 0.",
            show_default=False,
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="A file of a sentence a line: how alike the layers of two checkpoints are, or of one.",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        Literal["js", "cka"] | None,
        typer.Option(
            help="With --corpus: where heads look (js) or what hidden states hold (cka). Default: both.",
            show_default=False,
        ),
    ] = None,
    max_sentences: Annotated[
        int | None,
        typer.Option(min=1, help=f"With --corpus: the first so many. Default: {MAX_SENTENCES}.", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help=f"With --corpus: sentences at once. Default: {BATCH_SIZE}.", show_default=False),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw into.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all that the picture shows.")] = False,
) -> None:
    """Show where the heads of BERT, RoBERTa and ELECTRA encoders look in a sentence; or, over a corpus, how alike
    layers are: the Jensen-Shannon distance between where their heads look, and linear CKA between their hidden states.
    """
    if (text is None) == (corpus is None):
        raise MsltError("mslt attention: give either --text SENTENCE or --corpus FILE")
    for option, given, belongs in (
        ("--head", head is not None, text is not None), ("--measure", measure is not None, corpus is not None),
        ("--max-sentences", max_sentences is not None, corpus is not None),
        ("--batch-size", batch_size is not None, corpus is not None),
    ):  # fmt: skip
        if given and not belongs:
            raise MsltError(f"{option} is for {'--corpus' if text is not None else '--text'}; leave it out")
    if corpus is not None and len(checkpoints) > 2:
        raise MsltError(f"{len(checkpoints)} checkpoints: with --corpus give two, or one to compare with itself")
    if picture is not None and picture.is_dir():
        raise MsltError(f"--picture {picture}: is a folder; name the file to write")
    sentences = [] if corpus is None else read_sentences(corpus, max_sentences or MAX_SENTENCES)

    import torch
    from transformers.utils import logging

    from mslt.evaluate.attention import open_encoder

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders = [open_encoder(argument, device) for argument in checkpoints]
    if text is not None:
        _text(encoders, text, head or "0", picture, as_json)
    else:
        _corpus(encoders[0], encoders[-1], sentences, measure, batch_size or BATCH_SIZE, picture, as_json)


def read_sentences(path: Path, most: int) -> list[str]:
    """The first lines that are not blank."""
    sentences: list[str] = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    sentences.append(line.strip())
                if len(sentences) == most:
                    break
    except (OSError, UnicodeDecodeError) as error:
        raise MsltError(
            f"--corpus {path}: not readable as UTF-8 ({error}); give a text file, a sentence a line"
        ) from None
    if not sentences:
        raise MsltError(f"--corpus {path}: holds no sentence; give a text file, a sentence a line")
    return sentences


def _text(encoders: "list[Encoder]", text: str, head: str, picture: Path | None, as_json: bool) -> None:
    from mslt.evaluate.attention import text_maps

    for encoder in encoders:
        if head != "all" and not (head.isdecimal() and int(head) < encoder.num_heads):
            raise MsltError(f"--head {head}: {encoder.name} has heads 0 to {encoder.num_heads - 1}; give one of them, "
                            "or all")  # fmt: skip
    found = [text_maps(encoder, text) for encoder in encoders]
    for maps in found:
        if maps.was_cut:
            typer.echo(f"{maps.name}: has positions for {len(maps.tokens)} tokens; what follows is left out", err=True)
    chosen = None if head == "all" else int(head)
    heads = {maps.name: range(maps.weights_LHTT.shape[1]) if chosen is None else [chosen] for maps in found}
    if as_json:
        typer.echo(json.dumps({"text": text, "checkpoints": [_maps_json(maps, heads[maps.name]) for maps in found]}))
    else:
        _print_maps(found, heads)
    if picture is not None:
        from mslt.report.attention import draw_maps

        draw_maps(found, chosen, picture)
        typer.echo(f"maps: {picture}", err=as_json)


def _maps_json(maps: "TextMaps", heads: Any) -> dict[str, Any]:
    return {
        "checkpoint": maps.name,
        "tokens": maps.tokens,
        "maps": [
            {"layer": layer, "head": head, "weights": maps.weights_LHTT[index, head].tolist()}
            for index, layer in enumerate(maps.layers)
            for head in heads
        ],
    }


def _print_maps(found: "list[TextMaps]", heads: dict[str, Any]) -> None:
    from mslt.evaluate.attention import summarize

    rows = []
    for maps in found:
        for index, layer in enumerate(maps.layers):
            for head in heads[maps.name]:
                told = summarize(maps.weights_LHTT[index, head], maps.is_special_T)
                shares = [f"{told[name]:.0%}" for name in ("itself", "neighbours", "special")]
                rows.append([maps.name, str(layer), str(head), f"{told['entropy_bits']:.2f} bits", *shares])
    print_table(["checkpoint", "layer", "head", "entropy", "to itself", "to neighbours", "to special tokens"], rows)


def _corpus(
    first: "Encoder",
    second: "Encoder",
    sentences: list[str],
    measure: str | None,
    batch_size: int,
    picture: Path | None,
    as_json: bool,
) -> None:
    from mslt.cli.progress import counted
    from mslt.evaluate.attention import compare

    measures = ("js", "cka") if measure is None else (measure,)
    with counted("sentences") as progress:
        likeness = compare(first, second, sentences, batch_size, measures, progress)
    if likeness.num_cut:
        typer.echo(f"{likeness.num_cut} of {likeness.num_texts} sentences: cut to the models' positions", err=True)
    if as_json:
        typer.echo(json.dumps(_likeness_json(likeness), indent=2))
    else:
        _print_likeness(likeness)
    if picture is not None:
        from mslt.report.attention import draw_likeness

        draw_likeness(likeness, picture)
        typer.echo(f"heat maps: {picture}", err=as_json)


def _likeness_json(likeness: "Likeness") -> dict[str, Any]:
    found: dict[str, Any] = {
        "checkpoints": likeness.names,
        "layers": likeness.layers,
        "sentences": likeness.num_texts,
        "tokens": likeness.num_tokens,
        "cut": likeness.num_cut,
    }
    if likeness.js_LK is not None:
        found["js_distance"] = likeness.js_LK.tolist()
    if likeness.cka is not None:
        found["hidden_states"] = [[0, *(layer + 1 for layer in layers)] for layers in likeness.layers]
        found["cka"] = [[None if value != value else value for value in row] for row in likeness.cka.tolist()]
        found["cka_of_noise"] = likeness.cka_of_noise
    return found


def _print_likeness(likeness: "Likeness") -> None:
    """A row for each layer of the first: how it stands to its namesake, and which of the second's is most like it; of
    one checkpoint which other of its layers."""
    (rows, columns), itself = likeness.layers, likeness.names[0] == likeness.names[1]
    tables = []
    if likeness.js_LK is not None:
        tables.append(("JS distance", likeness.js_LK.tolist(), [*rows], [*columns], min))
    if likeness.cka is not None:
        tables.append(("CKA", likeness.cka.tolist(), [-1, *rows], [-1, *columns], max))
    header = [
        "layer",
        *(f"{name} {to}" for name, *_ in tables for to in ([] if itself else ["to the same"]) + ["nearest"]),
    ]
    printed = []
    for layer in sorted({layer for _, _, of_first, _, _ in tables for layer in of_first}):
        cells = ["embeddings" if layer < 0 else str(layer)]
        for _, values, of_first, of_second, best in tables:
            line = dict(zip(of_second, values[of_first.index(layer)], strict=True)) if layer in of_first else {}
            if not itself:
                cells.append(f"{line[layer]:.4f}" if layer in line else "–")
            others = {
                other: value for other, value in line.items() if value == value and not (itself and other == layer)
            }
            nearest = best(others, key=lambda other: others[other]) if others else None
            where = "–" if nearest is None else "embeddings" if nearest < 0 else f"layer {nearest}"
            cells.append(where if nearest is None else f"{where} {others[nearest]:.4f}")
        printed.append(cells)
    typer.echo(f"{likeness.names[0]}, beside {'its own other layers' if itself else likeness.names[1]}: "
               f"{likeness.num_texts:,} sentences, {likeness.num_tokens:,} tokens")  # fmt: skip
    print_table(header, printed)
    if likeness.cka_of_noise is not None:
        typer.echo(f"CKA of states without anything in common would be {likeness.cka_of_noise:.4f} on so many tokens")
