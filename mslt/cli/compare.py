"""`mslt compare`: finished runs side by side, or a whole study, run and reported."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mslt.cli.refusals import refuse_unknown
from mslt.cli.tables import print_table
from mslt.errors import MsltError


class At(StrEnum):
    time = "time"
    step = "step"


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, the first the baseline; or one study (*.yaml).")],
    at: Annotated[
        At | None, typer.Option(help="Also compare losses where the shortest run ends, by time or by step.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw the loss curves into.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of a study. Default: runs/NAME.", show_default=False)] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Shard folder of a study, instead of data.shards.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of each run of a study. Default: one a GPU, or one.", show_default=False),
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Runs of a study that train side by side.")] = 1,
    glue: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET",
            help="Also what `mslt evaluate glue --preset PRESET` found of each, beside the paper's table.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what each run reached and what it took; runs that differ in their seed alone share a row. Of a study, do all
    runs first: equal time and equal steps, each schedule at the best of its learning rates, over all seeds; the same
    command again goes on where it stopped."""
    is_study = any(path.suffix in (".yaml", ".yml") for path in runs)
    for option, given, belongs in (
        ("--at", at is not None, not is_study), ("--glue", glue is not None, not is_study),
        ("--out", out is not None, is_study), ("--shards", shards is not None, is_study),
        ("--workers", workers is not None, is_study),
        ("--at-once", at_once > 1, is_study),
    ):  # fmt: skip
        if given and not belongs:
            raise MsltError(f"{option} is for {'run directories' if is_study else 'one study (*.yaml)'}; leave it out")
    if is_study and len(runs) > 1:
        raise MsltError(f"{len(runs)} arguments: give one study (*.yaml) alone, or run directories")
    if is_study:
        _study(runs[0], out or Path("runs") / runs[0].stem, shards, workers, at_once, picture, as_json)
    else:
        _runs(runs, at, picture, as_json, glue)


def _study(
    path: Path, out: Path, shards: Path | None, workers: int | None, at_once: int, picture: Path | None, as_json: bool
) -> None:
    import os

    import torch

    from mslt.launcher import num_workers_here, time_stages_here, training_apart
    from mslt.report.curves import draw_curves
    from mslt.report.study import as_json as study_json
    from mslt.report.study import findings, table, verdict
    from mslt.study import open_study, read_study, run_study

    num_workers = num_workers_here(workers)
    if workers is None and torch.cuda.device_count() > 1:
        num_workers = max(torch.cuda.device_count() // at_once, 1)
    if not torch.accelerator.is_available():  # the runs share the cores, and steps are timed as the runs take them
        os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // (num_workers * at_once), 1)))
    folder = shards or Path(read_study(path)[1].data.shards)
    options = ["--shards", str(folder)]
    with training_apart(options, num_workers, at_once) as train:
        study = open_study(path, out, folder, num_workers, lambda plan: time_stages_here(plan, folder, num_workers))
        chosen = run_study(study, train, at_once)
    found = findings(study, chosen)
    if as_json:
        typer.echo(study_json(found))
    else:
        header, *rows = table(found)
        print_table(header, rows, width=170)  # its columns hold a mean and a deviation each
        for line in verdict(found):
            typer.echo(line)
    if picture is not None:
        draw_curves({name: arms[0].run for name, arms in chosen.items()}, picture, study.step_seconds, study.title)
        typer.echo(f"curves: {picture}", err=as_json)


def _runs(runs: list[Path], at: At | None, picture: Path | None, as_json: bool, glue: str | None) -> None:
    from mslt.report.comparison import differences, outcomes

    rows, scored = outcomes(runs, at.value if at else None), []
    if glue is not None:  # it loads torch
        from mslt.evaluate.glue_tasks import PRESETS
        from mslt.report.glue import read_scores, score_tables

        refuse_unknown("--glue", glue, PRESETS)
        scored = [read_scores(run, glue) for run in runs]
    for difference in differences(runs):
        typer.echo(f"not comparable: {difference}", err=True)
    if as_json:
        described = [asdict(row) for row in rows]
        typer.echo(
            json.dumps({"runs": described, "glue": list(map(asdict, scored))} if scored else described, indent=2)
        )
    else:
        header = ["run", "steps", "workers", "held-out MLM", "accuracy", "NSP", "time", "speedup", "all-reduced"]
        printed = [
            [
                row.run + (f" and {row.num_seeds - 1} more seeds" if row.num_seeds > 1 else ""),
                f"{row.steps:,}", str(row.workers),
                f"{row.mlm_loss:.4f}" + (f" ± {row.deviation:.4f}" if row.num_seeds > 1 else ""),
                f"{row.mlm_accuracy:.1%}", "–" if row.nsp_loss is None else f"{row.nsp_loss:.4f}",
                f"{row.train_s:,.1f} s", f"{row.speedup:.2f}×", f"{row.reduced_bytes / 1e9:,.2f} GB",
                *([f"{row.loss_at:.4f}"] if row.loss_at is not None else []),
            ]
            for row in rows
        ]  # fmt: skip
        print_table(header + ([f"at equal {at.value}"] if at else []), printed)
        for table in score_tables(scored) if scored else ():
            cells = [
                [row.name + whose, row.steps, row.hours, *(row.scores.get(task, "–") for task in table.tasks)]
                for rows_of, whose in ((table.ours, ""), (table.reported, " (Yang et al.)"))
                for row in rows_of
            ]
            print_table(["", "steps", "hours", *table.tasks], cells, width=190, title=table.title)
        if scored:
            typer.echo(
                "Percent: median of the best setting's runs (their mean ± deviation); averages over what all have."
            )
            for task, differs in scored[0].differs.items():
                typer.echo(f"{task}: not as in the paper: {', '.join(differs)}")
            if scored[0].protocol["max_train_rows"] is not None:
                typer.echo(f"Fine-tuned on {scored[0].protocol['max_train_rows']:,} rows of each task at most.")
    if picture is not None:
        from mslt.report.curves import draw_curves

        labels = [path.name for path in runs]
        unique = len(set(labels)) == len(labels)
        draw_curves({path.name if unique else str(path): path for path in runs}, picture)
        typer.echo(f"curves: {picture}", err=as_json)
