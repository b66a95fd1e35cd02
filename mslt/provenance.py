"""Where a file comes from: command, commit, versions, machine. Written beside everything that outlives a run."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mslt

_PACKAGES = (
    "torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy", "pyarrow",
    "mwparserfromhell", "sentencex", "rensa",
)  # fmt: skip


def provenance() -> dict[str, Any]:
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "mslt": mslt.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def cpu_name() -> str:
    """`2 cores of AMD EPYC …`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout mslt runs from, with `+` for changes in it; None where it is installed."""
    folder = Path(mslt.__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        described = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
