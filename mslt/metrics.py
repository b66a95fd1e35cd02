"""metrics.jsonl: one JSON object a line, appended by rank 0.

`kind` is `train` (means over the steps since the line before) or `evaluation` (held-out, at the state after `step`
steps). `stage` counts from 1, `step` counts optimizer steps over all stages.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mslt.files import whole_file


def append(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records in order. A last line without its newline was cut short by a kill and is left out."""
    if path.exists():
        with open(path) as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)


def rewind(path: Path, stage: int, step: int) -> None:
    """Drop what a killed run wrote after the state it resumes from: later stages, and later steps of `stage`."""
    if path.exists():
        kept = [r for r in read(path) if r["stage"] < stage or (r["stage"] == stage and r["step"] <= step)]
        with whole_file(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
