"""`mslt evaluate glue`: fine-tune a checkpoint on the tasks of GLUE, and score it."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mslt.cli.refusals import refuse_rate, refuse_unknown
from mslt.cli.tables import print_table
from mslt.errors import MsltError

if TYPE_CHECKING:
    from mslt.evaluate.glue import Cell


def glue(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="Folder or hub name of a BERT, RoBERTa or ELECTRA; RUN/stage-N/model.")
    ],
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with GLUE's own files. Default: from the hub.", show_default=False)
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Whose protocol: mslt, deebert, deebert-roberta, bertvision, convexity, quick.")
    ] = "mslt",
    task: Annotated[
        list[str] | None, typer.Option(help="One of the preset's tasks, or several times. Default: all.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results. Default: CKPT-evaluation/glue-PRESET, and which objective.", show_default=False
        ),
    ] = None,
    subset: Annotated[bool, typer.Option("--subset", help="The files hold a part of GLUE; do not count rows.")] = False,
    max_train_rows: Annotated[
        int | None, typer.Option(min=1, help="Train on so many rows of each task.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option(help="Instead of the preset's; several times for several.", show_default=False)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Instead of the preset's.", show_default=False)] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the preset's.", show_default=False)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=8, help="Instead of the preset's; of a row.", show_default=False)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many, instead of the preset's.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub name. Default: the checkpoint's own.", show_default=False)
    ] = None,
    new_pooler: Annotated[
        bool, typer.Option("--new-pooler", help="Where the checkpoint has no pooler, draw one at random.")
    ] = False,
    multi_objective: Annotated[
        bool,
        typer.Option(
            "--multi-objective",
            help="Instead of its label, half of a batch's samples have hidden words to be read back.",
        ),
    ] = False,
    extra_layer: Annotated[
        bool,
        typer.Option(
            "--extra-layer", help="The same, the words read behind one more layer, which is left out afterwards."
        ),
    ] = False,
    mlm_head: Annotated[
        Literal["pretrained", "random"],
        typer.Option(help="With --multi-objective or --extra-layer: the checkpoint's MLM head, or one drawn."),
    ] = "pretrained",
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of matrix products.")] = "fp32",
    at_once: Annotated[
        int, typer.Option(min=1, help="Fine-tunings side by side, where there is no GPU; else one on each.")
    ] = 1,
    hostfile: Annotated[
        Path | None, typer.Option(help="Machines that share the work and the folder --out.", show_default=False)
    ] = None,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="This machine's line in the hostfile, from 0.", show_default=False)
    ] = None,
    save_models: Annotated[
        bool, typer.Option("--save-models", help="Keep the model of each task's median run, below --out.")
    ] = False,
    test_submission: Annotated[
        Path | None, typer.Option(help="Zip to write for GLUE's server.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fine-tune on every task, with every rate and seed of the preset, and print the table. What is done is not done
    again: the same command goes on after a stop. Ends with status 1 where a fine-tuning failed twice."""
    from mslt.evaluate.glue_tasks import PRESETS, TASKS
    from mslt.nodes import everywhere, on_every_host, read_hostfile
    from mslt.orphans import leave_with_the_listener

    if node_rank is not None and hostfile is None:
        raise MsltError(f"--node-rank {node_rank}: names a line of a hostfile; give --hostfile, too")
    refuse_unknown("--preset", preset, PRESETS)
    for name in task or ():
        refuse_unknown("--task", name, TASKS)
    for option, given in (("--task", task or []), ("--learning-rate", learning_rate or [])):
        if len(set(given)) < len(given):
            raise MsltError(f"{option}: {', '.join(map(str, given))}: one stands there twice")
    for rate in learning_rate or ():
        refuse_rate("--learning-rate", rate, "5e-5")
    if multi_objective and extra_layer:
        raise MsltError("--multi-objective, --extra-layer: the latter is the former with a layer more; give one")
    if mlm_head == "random" and not (multi_objective or extra_layer):
        raise MsltError("--mlm-head random: goes with --multi-objective or --extra-layer")
    if hostfile is not None and node_rank is None:
        raise typer.Exit(on_every_host(everywhere(read_hostfile(hostfile), sys.argv[1:]), leave=None))
    num_at_once = at_once
    if hostfile is not None:
        hosts = read_hostfile(hostfile)
        if node_rank is not None and node_rank >= len(hosts.names):
            raise MsltError(f"--node-rank {node_rank}: {hosts.file} names {len(hosts.names)} hosts, counted from 0")
        num_at_once = hosts.slots
        leave_with_the_listener()

    from transformers.utils import logging

    from mslt.evaluate.glue import Source, cells_of
    from mslt.evaluate.glue_grid import run_glue
    from mslt.evaluate.multi_objective import MultiObjective
    from mslt.evaluate.opening import locate
    from mslt.evaluate.positions import untrained_positions
    from mslt.rundir import evaluation_folder

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    located, origin = locate(checkpoint)
    objective, kind = None, ""
    if multi_objective or extra_layer:
        objective = MultiObjective(extra_layer, mlm_head)
        kind = "-extra-layer" if extra_layer else "-multi-objective"
    folder = out or evaluation_folder(located) / f"glue-{preset}{kind}"
    protocol = PRESETS[preset]
    if learning_rate:
        protocol = replace(protocol, learning_rates=tuple(learning_rate), rates={})
    if batch_size is not None:
        protocol = replace(protocol, batch_sizes=(batch_size,), batches={})
    if epochs is not None:
        protocol = replace(protocol, num_epochs=epochs, epochs={})
    if max_tokens is not None:
        protocol = replace(protocol, max_tokens=max_tokens, tokens={})
    source = Source(located, tokenizer, data_dir, subset, max_train_rows, new_pooler, objective)
    cells = cells_of(protocol, task or protocol.tasks, range(seeds or protocol.num_seeds), precision)
    if warning := untrained_positions(located, origin, max(cell.max_tokens for cell in cells)):
        _tell(f"warning: {warning}")
    found = run_glue(
        source,
        preset,
        protocol,
        cells,
        folder,
        _devices(num_at_once, is_told=hostfile is not None),
        _tell,
        save_models,
        test_submission,
    )
    if node_rank:
        return
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found, cells, folder)
    if any(entry["failed"] for entry in found["tasks"].values()):
        raise typer.Exit(1)


def _devices(num_at_once: int, is_told: bool) -> list[str]:
    """Every GPU, of a machine in a hostfile as many as it has slots; without GPUs so many shares of the cores."""
    import os

    import torch

    if torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        return [f"cuda:{index}" for index in range(min(num_at_once, num_gpus) if is_told else num_gpus)]
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // num_at_once, 1)))
    return ["cpu"] * num_at_once


def _tell(line: str) -> None:
    print(f"glue: {line}", file=sys.stderr, flush=True)


def _print(found: dict[str, Any], cells: "list[Cell]", folder: Path) -> None:
    rows = []
    for task, entry in found["tasks"].items():
        if entry["best"] is None:
            rows.append([task, entry["headline"], "–", "–", "0", "–", f"{len(entry['failed'])} runs failed"])
            continue
        spread = f"{entry['mean']:.1%}" + ("" if entry["deviation"] is None else f" ± {entry['deviation']:.1%}")
        means = [
            f"{metric} {sum(values) / len(values):.3f}"
            for split in entry["scores"].values()
            for metric, values in split.items()
        ]
        rows.append(
            [task, entry["headline"], f"{entry['median']:.1%}", spread, str(len(entry["headlines"])),
             entry["best"].replace("_", ", "), ", ".join(means)]
        )  # fmt: skip
    if found["average"] is not None:
        rows.append(["average", "", f"{found['average']:.1%}", "", "", "", ""])
    header = ["task", "metric", "median", "mean ± deviation", "runs", "best setting", "all metrics, means"]
    from mslt.evaluate.glue_grid import chosen_here

    print_table(header, rows, width=150, title=f"GLUE, validation splits, preset {found['preset']}")
    if chosen := chosen_here(found):
        typer.echo(chosen)
    for task, entry in found["tasks"].items():
        for name in entry["failed"]:
            typer.echo(
                f"{task}: failed twice: {name}; its setting does not count. {folder / 'cells' / name}.failed.txt"
            )
    typer.echo(f"{folder / 'results.json'}: {len(cells)} fine-tunings")
