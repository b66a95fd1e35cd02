"""What an evaluation leaves in its folder, and of which settings: another's is refused, not overwritten."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mslt.errors import MsltError

FORMAT = 2  # of a probe's result, in its settings: 1 did not say which rows were right


def finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result at `path`, None where there is none. MsltError where it is of other settings, or no result."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        refuse_other(path, dict(result["settings"]), settings)
    except (ValueError, KeyError, TypeError):
        raise MsltError(f"{path}: is no result of mslt's; give another --out, or move it away") from None
    return result


@contextmanager
def refused_if_damaged(path: Path, remedy: str) -> Iterator[None]:
    """MsltError where what is read of `path` inside is not what we write."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MsltError(f"{path}: is damaged ({error!r}); {remedy}") from None


def refuse_other(path: Path, before: dict[str, Any], settings: dict[str, Any], option: str = "--out") -> None:
    """MsltError where what lies there was made with other settings."""
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        changes = ", ".join(f"{name} {before.get(name)}, now {settings.get(name)}" for name in names)
        raise MsltError(f"{path}: is the result of other settings ({changes}); give another {option}, or move it away")
