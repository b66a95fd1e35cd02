"""Checkpoints inside a stage: trainable parameters and the optimizer's state, committed by a manifest.

    checkpoints/step-00001200/
      rank-0.safetensors …   KIND/PARAMETER/START: elements of flattened weights and moments that the rank held; fp32
      manifest.json          written last: sha256 and size of each file, what they belong to, the loop's numbers

The folder appears under its name only when it is whole. Frozen weights are in the stage base, never here. Tensors lie
under their parameter's name and place in it, so any number of workers, with any ZeRO stage, reads them. (DeepSpeed's
universal checkpoints would need a conversion, and read pickles: a stranger's could run code.)
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mslt.files import fsync_folder, full_disk_named, sha256_file, write_json
from mslt.models.checkpoint import write_tensors
from mslt.rundir import KEPT

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """`step` counts inside the stage; `manifest` holds what was given when it was written."""

    path: Path
    step: int
    manifest: dict[str, Any]

    @contextmanager
    def open(self) -> Iterator["Shares"]:
        with ExitStack() as stack:
            files = (self.path / name for name in self.manifest["files"])
            yield Shares([stack.enter_context(safe_open(file, framework="pt")) for file in files])


class Shares:
    """The files of all ranks as one."""

    def __init__(self, files: list[Any]) -> None:
        self._runs: dict[tuple[str, str], list[tuple[int, int, Any]]] = defaultdict(list)
        for file in files:
            for key in file.keys():  # noqa: SIM118 - not a dict
                kind, name, start = key.split("/")
                run = file.get_slice(key)
                self._runs[kind, name].append((int(start), run.get_shape()[0], run))

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor | None:
        """Elements `start` to `start + numel` of a flattened tensor, read alone; None where there is nothing of it."""
        runs = sorted(self._runs.get((kind, name), []), key=lambda run: run[0])
        parts = [
            run[max(start - first, 0) : min(start + numel - first, length)]
            for first, length, run in runs
            if first < start + numel and start < first + length
        ]
        if not parts:
            return None
        found = torch.cat(parts)
        assert len(found) == numel, f"{kind} of {name}: {len(found)} of {numel} elements from {start} on"
        return found

    def whole(self, kind: str) -> dict[str, torch.Tensor]:
        """Every tensor of a kind, flattened, by parameter."""
        tensors = {}
        for found, name in list(self._runs):
            if found == kind:
                numel = max(first + length for first, length, _ in self._runs[kind, name])
                tensor = self.read(kind, name, 0, numel)
                assert tensor is not None
                tensors[name] = tensor
        return tensors


def commit(folder: Path, step: int, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write a checkpoint of one process, now."""
    with _gone_when_it_fails(folder, step):
        temporary = _begin(folder, step)
        _seal(folder, step, dict([_write_share(temporary, 0, tensors)]), about)


class Writer:
    """Writes the checkpoints of all ranks behind the step loop's back, one at a time.

    Each rank hands over its tensors, on the CPU and its own to keep. Each writes and syncs its file; when all have,
    rank 0 commits. An error on any rank (a full disk) is raised on all of them by the next call.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._group = torch.distributed.new_group(backend="gloo")  # its own: the loop's collectives go on beside it
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def write(self, folder: Path, step: int, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        """Start writing, when the checkpoint before it is done."""
        self.wait()
        self._writing = self._pool.submit(self._write, folder, step, tensors, about)

    def wait(self) -> None:
        """Return when everything handed over is committed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def raise_if_failed(self) -> None:
        if self._writing is not None and self._writing.done():
            self.wait()

    def close(self) -> None:
        self._pool.shutdown()
        torch.distributed.destroy_process_group(self._group)

    def _write(self, folder: Path, step: int, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        with _gone_when_it_fails(folder, step) if self._rank == 0 else nullcontext():  # it fails when all are through
            with self._together():
                if self._rank == 0:
                    _begin(folder, step)
            share: list[tuple[str, dict[str, Any]]] = []
            with self._together():
                if tensors:
                    share.append(_write_share(_temporary(folder, step), self._rank, tensors))
            shares: list[list[tuple[str, dict[str, Any]]]] = [[]] * torch.distributed.get_world_size(self._group)
            torch.distributed.all_gather_object(shares, share, group=self._group)
            with self._together():
                if self._rank == 0:
                    _seal(folder, step, dict(entry for written in shares for entry in written), about)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Wait for all ranks at the end; where one of them failed, all do."""
        error = None
        try:
            yield
        except OSError as caught:
            error = caught
        errors: list[tuple[int | None, str] | None] = [None] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(
            errors, None if error is None else (error.errno, str(error)), group=self._group
        )
        failed = {rank: found for rank, found in enumerate(errors) if found is not None}
        if failed:
            listed = "; ".join(f"rank {rank}: {said}" for rank, (_, said) in failed.items())
            raised = OSError(f"checkpoint not written: {listed}")
            raised.errno = next(iter(failed.values()))[0]
            raise raised from error


def newest_valid(folder: Path, base_sha256: str, plan: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of this stage base and plan (its digest) that is whole, and a line about each newer one
    passed over."""
    passed_over: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        fault = _fault(path, base_sha256, plan)
        if fault is None:
            manifest = json.loads((path / _MANIFEST).read_text())
            return Checkpoint(path, manifest["step"], manifest), passed_over
        passed_over.append(f"checkpoint {path} passed over: {fault}")
    return None, passed_over


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _temporary(folder: Path, step: int) -> Path:
    return folder / f".step-{step:08d}.tmp"


def _begin(folder: Path, step: int) -> Path:
    """An empty folder to write in; what a killed run left half-written goes."""
    folder.mkdir(exist_ok=True)
    for left in folder.glob(".step-*"):
        shutil.rmtree(left)
    temporary = _temporary(folder, step)
    temporary.mkdir()
    return temporary


@contextmanager
def _gone_when_it_fails(folder: Path, step: int) -> Iterator[None]:
    """Half a checkpoint would keep a full disk full."""
    try:
        yield
    except OSError:
        shutil.rmtree(_temporary(folder, step), ignore_errors=True)
        raise


def _write_share(temporary: Path, rank: int, tensors: dict[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Name of the rank's file, and what the manifest says of it."""
    file = temporary / f"rank-{rank}.safetensors"
    with full_disk_named(file):
        write_tensors(file, tensors)
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    return file.name, {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _seal(folder: Path, step: int, files: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the manifest and give the folder its name; then delete all but the newest KEPT, and any of a later step: it
    was passed over."""
    temporary, path = _temporary(folder, step), _path(folder, step)
    write_json(temporary / _MANIFEST, {"step": step, "files": files, **about})
    if path.exists():
        shutil.rmtree(path)
    os.rename(temporary, path)
    fsync_folder(folder)
    steps = sorted(folder.glob("step-*"))
    end = steps.index(path) + 1
    for unwanted in [*steps[end:], *steps[: max(end - KEPT, 0)]]:
        shutil.rmtree(unwanted)


def _fault(path: Path, base_sha256: str, plan: str) -> str | None:
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if manifest["base_sha256"] != base_sha256:
            return "belongs to another stage base"
        if manifest["plan"] != plan:
            return "belongs to another plan"
        for name, about in manifest["files"].items():
            file = path / name
            if file.stat().st_size != about["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, its manifest says {about['bytes']}"
            if sha256_file(file) != about["sha256"]:
                return f"{name} does not have the manifest's sha256"
            with safe_open(file, framework="pt"):
                pass  # its header can be read: a hash says nothing of what a stranger has written
        if not isinstance(manifest["step"], int):
            return f"not readable (step {manifest['step']!r})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return f"not readable ({error})"
    return None
