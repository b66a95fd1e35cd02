"""Plain data from what a user wrote: unknown keys refused, every mistake listed at once under its path."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mslt.errors import MsltError


class Frozen(BaseModel):
    """Plain data: unknown keys are refused, values never change, JSON carries it without loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")


FrozenType = TypeVar("FrozenType", bound=Frozen)


def validate(kind: type[FrozenType], value: Any, where: str) -> FrozenType:
    """Build `kind` from plain data; MsltError lists every mistake with its path, `where` says in which file."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        lines = list(_mistakes(error))
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise MsltError(f"{where}: {count}\n" + "\n".join(f"  {line}" for line in lines)) from None


def _mistakes(error: ValidationError) -> Iterator[str]:
    for entry in error.errors():
        path = ".".join(str(part) for part in entry["loc"])
        if entry["type"] == "value_error" and not path:
            yield from str(entry["ctx"]["error"]).splitlines()  # ours: each line names its own path
        elif entry["type"] == "extra_forbidden":
            yield f"{path}: unknown key; remove it or mend its spelling"
        elif entry["type"] == "missing":
            yield f"{path}: missing"
        elif entry["type"] == "value_error":
            yield f"{path}: {entry['ctx']['error']}"
        else:
            yield f"{path}: {entry['msg']}, not {entry['input']!r}"


def read_yaml(path: Path) -> Any:
    """MsltError where the file cannot be read or is no YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MsltError(f"{path}: not readable as YAML: {error}") from None
