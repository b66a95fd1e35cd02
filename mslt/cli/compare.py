"""`mslt compare`: finished runs side by side."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; the first is the baseline of the speedups.")],
    picture: Annotated[Path | None, typer.Option(help="PNG to draw the loss curves into.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what each run reached and what it took."""
    from rich.console import Console
    from rich.table import Table

    from mslt.report.comparison import differences, outcomes

    rows = outcomes(runs)
    for difference in differences(runs):
        typer.echo(f"not comparable: {difference}", err=True)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        table = Table()
        table.add_column("run", overflow="fold")
        for heading in ("steps", "workers", "held-out MLM", "accuracy", "NSP", "time", "speedup", "all-reduced"):
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(
                row.run, f"{row.steps:,}", str(row.workers), f"{row.mlm_loss:.4f}", f"{row.mlm_accuracy:.1%}",
                "–" if row.nsp_loss is None else f"{row.nsp_loss:.4f}", f"{row.train_s:,.1f} s", f"{row.speedup:.2f}×",
                f"{row.reduced_bytes / 1e9:,.2f} GB",
            )  # fmt: skip
        console = Console()
        console.width = max(console.width, 120)
        console.print(table)
    if picture is not None:
        from mslt.report.curves import draw_curves

        draw_curves(runs, picture)
        typer.echo(f"curves: {picture}", err=as_json)
