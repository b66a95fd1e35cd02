"""What every record begins with: date, command, commit, machine, versions."""

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mslt.engine.ds_config import zero_stage
from mslt.files import write_text
from mslt.plan import Plan, autocast_dtype
from mslt.provenance import cpu_name


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def hardware() -> str:
    """`1 × NVIDIA H200` or `2 cores of AMD EPYC …`."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return cpu_name()


def this_command() -> str:
    """The running module's command line, as one would type it in the checkout."""
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def heading(title: str, command: str, provenance: dict[str, Any], hardware: str) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items() if version)
    return [
        f"# {title}",
        "",
        f"- date: {today()}",
        f"- command: `{command}`",
        f"- commit: {provenance['commit']}",
        f"- hardware: {hardware}",
        f"- versions: python {provenance['python']}, {versions}",
        "",
    ]


def shape(plan: Plan, num_workers: int) -> str:
    """What was trained, in one sentence."""
    model, stage = plan.model, plan.stages[-1]
    return (
        f"{model.num_hidden_layers} layers × {model.hidden_size}, vocabulary {model.vocab_size:,}, "
        f"T={stage.sequence_length}, {plan.data.max_predictions} predictions a sample, batch {stage.batch_size} on "
        f"{num_workers} worker{'s' if num_workers > 1 else ''}, ZeRO-{zero_stage(plan.engine)}, "
        f"{autocast_dtype(plan.engine) or 'fp32'}."
    )


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, first column left, the others right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def write_record(path: Path | None, lines: list[str]) -> None:
    """Print the record, and write it where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(lines) + "\n")
    print("\n".join(lines))
