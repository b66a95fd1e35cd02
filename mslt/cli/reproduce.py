"""`mslt reproduce`: every table and figure of the four papers, and how to make it."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from mslt.cli.refusals import refuse_unknown
from mslt.cli.tables import print_table


def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="One of them, like mslt-t2: its commands and the paper's figures.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the summary as Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every table and figure of the papers this toolkit is made after: the commands that make it, what the paper
    reports, and whether it has been run."""
    from mslt.report import reproduce as known

    every = {one.name: one for one in known.reproductions()}
    if name is not None:
        refuse_unknown("NAME", name, every)
        every = {name: every[name]}
    if as_json:
        typer.echo(
            json.dumps(
                [{**asdict(one), "gpu_hours": one.gpu_hours, "status": known.status(one)} for one in every.values()],
                indent=2,
            )
        )
    elif markdown:
        typer.echo("\n".join(known.markdown(list(every.values()))))
    elif name is None:
        rows = [[one.name, one.what, known.status(one)] for one in every.values()]
        print_table(["name", "what", "state"], rows, width=130)
        typer.echo("`mslt reproduce NAME` has the commands and the paper's figures.")
    else:
        one = every[name]
        typer.echo(f"{one.what}, of {known.PAPERS[name.split('-')[0]]}: {known.status(one)}\n")
        for line in one.commands:
            typer.echo(f"  {line}")
        if one.reported:
            typer.echo("")
            header, *reported = map(list, one.reported)
            print_table(header, reported, width=150, title="as the paper has it")
        if one.note:
            typer.echo(f"\n{one.note}")
        if one.ours is not None:
            typer.echo(f"\nhere, in small: {one.ours.found} ({known.RECORDS}/{one.ours.record})")
