"""`mslt evaluate mlm`: held-out masked words and next sentences."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

OF_RUN = "Default: as in the run, or"


def mlm(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="Folder of a checkpoint, a run's stage or a run (its last stage); or a hub's name.",
        ),
    ],
    shards: Annotated[Path, typer.Option(help="Shard folder; its validation split is what counts.")],
    sequence_length: Annotated[
        int | None, typer.Option(min=8, help=f"Tokens. {OF_RUN} 128.", show_default=False)
    ] = None,
    samples: Annotated[int | None, typer.Option(help=f"How many. {OF_RUN} 4096.", show_default=False)] = None,
    max_predictions: Annotated[
        int | None, typer.Option(help=f"Masked words of a sample at most. {OF_RUN} 20.", show_default=False)
    ] = None,
    mask_probability: Annotated[float | None, typer.Option(help=f"{OF_RUN} 0.15.", show_default=False)] = None,
    short_sequence_probability: Annotated[float | None, typer.Option(help=f"{OF_RUN} 0.1.", show_default=False)] = None,
    whole_word_masking: Annotated[bool | None, typer.Option(help=f"{OF_RUN} off.", show_default=False)] = None,
    next_sentence_prediction: Annotated[
        bool | None, typer.Option(help=f"Samples are pairs of sentences. {OF_RUN} on.", show_default=False)
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help=f"Of matrix products. {OF_RUN} fp32.", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Samples at a time. Default: a run's micro-batch, or 32.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure held-out loss and accuracy of masked words, and of next sentences where there is a head for them, at
    fixed samples and masks. Of a run's model they are the numbers that the run logged at the end of its stage. Takes
    BERT, RoBERTa and ELECTRA's generator."""
    import torch
    from transformers.utils import logging

    from mslt.cli.progress import counted
    from mslt.evaluate.mlm import evaluate_mlm

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with counted("held-out samples") as progress:
        found = evaluate_mlm(
            checkpoint,
            shards,
            device,
            progress,
            sequence_length=sequence_length,
            evaluation_samples=samples,
            max_predictions=max_predictions,
            mask_probability=mask_probability,
            short_sequence_probability=short_sequence_probability,
            whole_word_masking=whole_word_masking,
            next_sentence_prediction=next_sentence_prediction,
            precision=precision,
            batch_size=batch_size,
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(
        f"{found['checkpoint']}: {found['samples']:,} held-out samples of {found['sequence_length']} tokens, "
        f"{found['mlm_tokens']:,} masked words, {found['precision']}"
    )
    for line in lines(found):
        typer.echo(f"  {line}")


def lines(found: dict[str, Any]) -> list[str]:
    """A line for each head, then what to hold them against."""

    def head(means: dict[str, float], name: str) -> str:
        return f"{name.upper()} {means[f'{name}_loss']:.4f} nats, {means[f'{name}_accuracy']:.1%} right"

    printed = [head(found, name) for name in ("mlm", "nsp") if f"{name}_loss" in found]
    if found["unigram_entropy_nats"] is not None:
        printed.append(f"one that knows only how often each token occurs: MLM {found['unigram_entropy_nats']:.4f} nats")
    if found["logged"] is not None:
        logged = ", ".join(head(found["logged"], name) for name in ("mlm", "nsp") if f"{name}_loss" in found["logged"])
        printed.append(f"logged by the run: {logged}")
    return printed + [f"remark: {remark}" for remark in found["remarks"]]
