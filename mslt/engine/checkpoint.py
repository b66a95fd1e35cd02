"""Checkpoints inside a stage: trainable parameters and the optimizer's state, committed by a manifest.

    checkpoints/step-00001200/
      state.safetensors      weight/NAME, exp_avg/NAME, exp_avg_sq/NAME; fp32
      manifest.json          written last: sha256 and size of the file, what it belongs to, the loop's numbers

The folder appears under its name only when it is whole. Frozen weights are in the stage base, never here.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mslt.files import sha256_file, whole_folder, write_json
from mslt.models.checkpoint import write_tensors

KEPT = 2
_STATE, _MANIFEST = "state.safetensors", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """`step` counts inside the stage; `manifest` holds what was given to `commit`."""

    path: Path
    step: int
    manifest: dict[str, Any]

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / _STATE)


def commit(folder: Path, step: int, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write the checkpoint whole, then delete all but the newest KEPT, and any of a later step: it was passed over."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}"
    with whole_folder(path) as temporary:
        state = temporary / _STATE
        write_tensors(state, tensors)
        manifest = {"step": step, "bytes": state.stat().st_size, "sha256": sha256_file(state), **about}
        write_json(temporary / _MANIFEST, manifest)
    others = sorted(folder.glob("step-*"))
    for unwanted in [*others[others.index(path) + 1 :], *others[: others.index(path) + 1 - KEPT]]:
        shutil.rmtree(unwanted)


def newest_valid(folder: Path, base_sha256: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of this stage base that is whole, and a line about each newer one passed over."""
    passed_over: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        fault = _fault(path, base_sha256)
        if fault is None:
            manifest = json.loads((path / _MANIFEST).read_text())
            return Checkpoint(path, manifest["step"], manifest), passed_over
        passed_over.append(f"checkpoint {path} passed over: {fault}")
    return None, passed_over


def _fault(path: Path, base_sha256: str) -> str | None:
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        state = path / _STATE
        if manifest["base_sha256"] != base_sha256:
            return "belongs to another stage base"
        if state.stat().st_size != manifest["bytes"]:
            return f"{_STATE} has {state.stat().st_size} bytes, its manifest says {manifest['bytes']}"
        if sha256_file(state) != manifest["sha256"]:
            return f"{_STATE} does not have the manifest's sha256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not readable ({error})"
    return None
