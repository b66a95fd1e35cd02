"""`mslt evaluate squad`: fine-tune on SQuAD and score, or score predictions alone."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mslt.cli.tables import print_table
from mslt.errors import MsltError

if TYPE_CHECKING:
    from mslt.evaluate.squad_data import Question, Version


def squad(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CKPT", help="BERT, RoBERTa or ELECTRA: a folder (RUN/stage-N/model), or a hub's name."),
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="SQuAD's own JSON to train on. Default: from the hub.", show_default=False)
    ] = None,
    dev: Annotated[
        Path | None, typer.Option(help="SQuAD's own JSON to score on. Default: from the hub.", show_default=False)
    ] = None,
    version: Annotated[Literal["1.1", "2.0"], typer.Option(help="Of SQuAD.")] = "2.0",
    subset: Annotated[bool, typer.Option("--subset", help="The files are a part of SQuAD: do not count rows.")] = False,
    max_train_questions: Annotated[
        int | None,
        typer.Option(min=1, help="Train on as many, drawn with the seed. Default: all.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub's name. Default: the checkpoint's own.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default: 5e-5, as in Devlin et al. 2019, section 4.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Windows. Default, as there: 48 for 2.0, 32 for 1.1.", show_default=False),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Default, as there: 2 for 2.0, 3 for 1.1.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the new head, order, dropout and drawn questions.")] = 0,
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of matrix products.")] = "fp32",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 … Default: cuda if there is one.", show_default=False)
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens of a window: question and context.")] = 384,
    stride: Annotated[int, typer.Option(min=1, help="Tokens from a window's beginning to the next one's.")] = 128,
    question_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a question that are kept.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="Folder. Default: CKPT-evaluation/squad2 (squad1).", show_default=False)
    ] = None,
    save_model: Annotated[bool, typer.Option("--save-model", help="Keep the fine-tuned model in OUT/model.")] = False,
    score: Annotated[
        Path | None,
        typer.Option(help="Only score these predictions, {id: text}, on --dev; no CKPT.", show_default=False),
    ] = None,
    null_odds: Annotated[
        Path | None,
        typer.Option(help="With --score: {id: odds of no answer}, to tune the threshold.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fine-tune a checkpoint on SQuAD and score it as the official script does: exact match and F1, on questions with
    and without an answer. Writes result.json, predictions.json, null_odds.json; given again, it prints the result."""
    if score is not None:
        if checkpoint is not None:
            raise MsltError(f"--score {score}: scores predictions alone; leave {checkpoint} out")
        found = _score(score, null_odds, read_questions(dev, version, "dev", subset), version)
    else:
        if checkpoint is None:
            raise MsltError("no checkpoint: name one to fine-tune, or give predictions by --score")
        if null_odds is not None:
            raise MsltError(f"--null-odds {null_odds}: belongs to --score; leave it out")
        if (train is None) != (dev is None):
            raise MsltError("--train and --dev: give both, or neither to read SQuAD from the hub")
        options = {
            "sequence_length": sequence_length, "stride": stride, "question_tokens": question_tokens,
            "max_train_questions": max_train_questions, "learning_rate": learning_rate, "batch_size": batch_size,
            "epochs": epochs, "seed": seed, "precision": precision,
        }  # fmt: skip
        found = _fine_tune(
            checkpoint, tokenizer, train, dev, version, subset, device, out, save_model, options, as_json
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)


def _fine_tune(
    checkpoint: str,
    tokenizer_source: str | None,
    train_file: Path | None,
    dev_file: Path | None,
    version: "Version",
    subset: bool,
    device: str | None,
    out: Path | None,
    save_model: bool,
    options: dict[str, Any],
    as_json: bool,
) -> dict[str, Any]:
    from transformers import AutoModelForQuestionAnswering

    from mslt.cli.progress import counted_parts
    from mslt.evaluate import squad
    from mslt.evaluate.device import open_device
    from mslt.evaluate.fine_tune import FineTuning
    from mslt.evaluate.opening import digest as weights_digest
    from mslt.evaluate.opening import (
        locate,
        open_config,
        open_fitting_tokenizer,
        open_with_new_head,
        tokenizer_digest,
    )
    from mslt.evaluate.positions import refuse_over_positions, untrained_positions
    from mslt.evaluate.result import finished
    from mslt.evaluate.squad_data import digest, drawn, with_placed_answers
    from mslt.rundir import evaluation_folder

    for name, default in zip(("learning_rate", "batch_size", "epochs"), squad.DEVLINS[version], strict=True):
        options[name] = default if options[name] is None else options[name]
    if options["learning_rate"] <= 0:
        raise MsltError(f"--learning-rate {options['learning_rate']}: must be above 0")
    where = open_device(device)
    source, origin = locate(checkpoint)
    out = out or evaluation_folder(source) / f"squad{version[0]}"
    config = open_config(source)
    tokenizer = open_fitting_tokenizer(config, source, tokenizer_source)
    frame = squad.frame_of(tokenizer)
    train, dev = (
        read_questions(file, version, split, subset) for file, split in ((train_file, "train"), (dev_file, "dev"))
    )
    settings = {
        "task": "squad", "version": version, "weights": weights_digest(source),
        "tokenizer": tokenizer_digest(tokenizer), "train": digest(train), "dev": digest(dev), **options,
    }  # fmt: skip
    before = finished(out / "result.json", settings)
    if before is not None and (not save_model or (out / "model").is_dir()):
        typer.echo(f"{out / 'result.json'}: finished before, with these settings", err=True)
        return before
    tuning = FineTuning(
        options["learning_rate"], options["batch_size"], options["epochs"], options["seed"],
        precision=options["precision"],
    )  # fmt: skip
    shape = squad.Shape(options["sequence_length"], options["stride"], options["question_tokens"])
    squad.refuse_narrow(shape, frame)
    refuse_over_positions(config, source, shape.sequence_length, "--sequence-length")
    model = open_with_new_head(source, AutoModelForQuestionAnswering, options["seed"])
    placed, num_left_out = with_placed_answers(drawn(train, options["max_train_questions"] or len(train), tuning.seed))
    if not placed:
        raise MsltError(f"{train_file}: no answer stands where its answer_start says; nothing can be learned from it")
    warnings = squad.warnings_of(placed, dev, num_left_out)
    if untrained := untrained_positions(source, origin, shape.sequence_length):
        warnings.append(untrained)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    out.mkdir(parents=True, exist_ok=True)
    with counted_parts() as tell:
        found, prediction = squad.evaluate(model.to(where), tokenizer, placed, dev, version, shape, tuning, tell)
    counts = {"train": len(train), "trained_on": len(placed), "left_out": num_left_out, "dev": len(dev)}
    written = squad.write(
        out, {"checkpoint": checkpoint, **found, "questions": counts, "warnings": warnings, "settings": settings},
        prediction, model if save_model else None, tokenizer,
    )  # fmt: skip
    typer.echo(f"result: {out / 'result.json'}", err=as_json)
    return written


def _score(predictions: Path, odds: Path | None, dev: list["Question"], version: "Version") -> dict[str, Any]:
    from mslt.evaluate.squad_data import read_by_id
    from mslt.evaluate.squad_scores import score, tuned_scores

    if odds is not None and version == "1.1":
        raise MsltError(f"--null-odds {odds}: in SQuAD 1.1 every question has an answer; leave it out")
    said = read_by_id(predictions, (str,), "text")
    found: dict[str, Any] = {
        "predictions": str(predictions),
        "scores": score(dev, said, version, str(predictions)),
    }
    if odds is not None:
        found["tuned_on_dev"] = tuned_scores(dev, said, read_by_id(odds, (int, float), "a number"), str(odds))
    if version == "2.0":
        found["all_empty"] = score(dev, {question.id: "" for question in dev}, version)["exact"]
    others = len(said) - len(dev)
    if others:
        found["warnings"] = [f"{predictions}: {others:,} of its {len(said):,} ids are not in the dev file: not scored"]
        typer.echo(f"warning: {found['warnings'][0]}", err=True)
    return found


def read_questions(path: Path | None, version: "Version", split: Any, subset: bool) -> list["Question"]:
    from mslt.evaluate.squad_data import read_file, refuse_lost_rows

    if path is None:
        import datasets

        from mslt.evaluate.squad_hub import NAMES, read_hub

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        questions, source = read_hub(version, split), NAMES[version]
    else:
        questions, source = read_file(path, version), str(path)
    if not subset or path is None:
        refuse_lost_rows(questions, source, version, split)
    return questions


def _print(found: dict[str, Any]) -> None:
    scores, tuned = found["scores"], found.get("tuned_on_dev")
    rows = []
    for prefix, what in (("", "all"), ("HasAns_", "with an answer"), ("NoAns_", "without an answer")):
        if f"{prefix}total" in scores and (prefix or "HasAns_total" not in scores or "NoAns_total" in scores):
            numbers = f"{scores[f'{prefix}exact']:.2f}", f"{scores[f'{prefix}f1']:.2f}"
            rows.append([what, f"{scores[f'{prefix}total']:,}", *numbers])
    if tuned:
        rows.append(["all, threshold tuned on dev", "", f"{tuned['best_exact']:.2f}", f"{tuned['best_f1']:.2f}"])
    if "all_empty" in found:
        rows.append(["saying no answer always", "", f"{found['all_empty']:.2f}", f"{found['all_empty']:.2f}"])
    title = found.get("checkpoint", found.get("predictions"))
    print_table(["", "questions", "exact match", "F1"], rows, title=title)
