"""`mslt doctor`: would a run succeed on these machines, and if not, what to mend."""

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mslt.doctor import Finding

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="Path of a recipe (*.yaml), or the name of one shipped with mslt.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/NAME.", show_default=False)] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Shard folder, instead of the recipe's data.shards.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine. Default: one a GPU, or one.", show_default=False),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="Machines to look at, a line `NAME slots=WORKERS` for each.", show_default=False),
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(
            min=0, help="This machine's line in the hostfile, from 0. Default: start all.", show_default=False
        ),
    ] = None,
    master_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the first host on which all meet.")
    ] = 29500,
    expect_gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs that each machine must have.", show_default=False)
    ] = None,
    min_gbps: Annotated[
        float | None,
        typer.Option(min=0.0, help="Fail where a link carries fewer gigabits a second.", show_default=False),
    ] = None,
    wait_s: Annotated[float, typer.Option(min=5.0, help="How long to wait for a machine that is silent.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at every machine before a run: versions, GPUs, links, the shared folder, the shards' checksums, room for the
    checkpoints, clocks. Ends with status 1 if a run would fail."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what torch's store and gloo log is in the findings
    from mslt.doctor import Asked, examine, fails, lay_token, settled
    from mslt.errors import MsltError
    from mslt.nodes import read_hostfile
    from mslt.rounds import as_first, as_other, start_everywhere

    def tell(doing: str) -> None:
        print(f"doctor: {doing}", file=sys.stderr)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # nothing is left behind
    if hostfile is None and node_rank is not None:
        raise MsltError(f"--node-rank {node_rank}: names a line of a hostfile; give --hostfile, too")
    if hostfile is not None and workers is not None:
        raise MsltError(f"--workers {workers}: the slots in {hostfile} say how many; leave one of the two out")
    asked = Asked(recipe, run_dir, shards, 1, workers, expect_gpus, min_gbps)
    if hostfile is None:
        host = socket.gethostname()
        tell("looking at versions, GPUs, shards and folders")
        with lay_token(host, asked.run) as (_, of_folder):
            found = settled([*examine(host, asked, is_first=True)[1], *of_folder])
        num_hosts = 1
    else:
        hosts = read_hostfile(hostfile)
        num_hosts = len(hosts.names)
        asked = replace(asked, num_hosts=num_hosts, workers=hosts.slots)
        if node_rank is None:
            found = start_everywhere(hosts, [*sys.argv[1:], *([] if as_json else ["--json"])], wait_s)
        elif node_rank >= num_hosts:
            raise MsltError(f"--node-rank {node_rank}: {hosts.file} names {num_hosts} hosts, counted from 0")
        elif node_rank > 0:
            raise typer.Exit(int(as_other(asked, hosts, node_rank, master_port, wait_s)))
        else:
            found = as_first(asked, hosts, master_port, wait_s, tell)
    if as_json:
        described = {"would_fail": fails(found), "findings": [asdict(finding) for finding in found]}
        typer.echo(json.dumps(described, indent=2))
    else:
        _print(found, num_hosts, recipe is None, shards is None)
    raise typer.Exit(int(fails(found)))


def _print(found: Sequence["Finding"], num_hosts: int, no_recipe: bool, no_shards: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{num_hosts} host{'s' * (num_hosts > 1)}", show_lines=True)
    is_bad = any(finding.remedy for finding in found)
    for heading in ("", "check", "host", "found", *(["remedy"] if is_bad else [])):
        table.add_column(heading)
    together: dict[tuple[str, str, str, str], list[str]] = {}
    for finding in found:
        key = (finding.status, finding.check, finding.said, finding.remedy)
        together.setdefault(key, []).append(finding.host)
    order = list(_COLOURS)
    for (status, check, said, remedy), hosts in sorted(together.items(), key=lambda item: order.index(item[0][0])):
        named = f"all {num_hosts}" if num_hosts > 1 and len(hosts) == num_hosts else ", ".join(hosts)
        cells = [check, named, escape(said), *([escape(remedy)] if is_bad else [])]
        table.add_row(f"[{_COLOURS[status]}]{status}[/]", *cells)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    if no_recipe:
        unseen = ["room for checkpoints", *(["shards"] if no_shards else []), "time of a step's gradients"]
        print(f"Not looked at without a recipe: {', '.join(unseen)}.")
    bad = {status: sum(finding.status == status for finding in found) for status in ("fail", "warn")}
    if bad["fail"]:
        print(f"A run would fail: {bad['fail']} line{'s' * (bad['fail'] > 1)} to mend.")
    else:
        print("A run would start." + (f" {bad['warn']} to look at." if bad["warn"] else ""))
