"""`mslt report`: one page of HTML about runs."""

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run directories, finished or under way.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write one page that opens without a network: plan, losses, where the time goes, starts, evaluations, provenance;
    several runs overlaid, the first the baseline of speeds."""
    from mslt.report.page import write_report

    num_bytes = write_report(runs, out)
    if as_json:
        typer.echo(json.dumps({"report": str(out), "bytes": num_bytes, "runs": [str(run) for run in runs]}, indent=2))
    else:
        typer.echo(f"{out}: {num_bytes / 1e6:.1f} MB, {', '.join(str(run) for run in runs)}")
