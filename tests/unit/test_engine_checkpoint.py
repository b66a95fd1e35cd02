"""In-stage checkpoints: committed whole, two kept, and never a damaged one loaded."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from mslt.engine import checkpoint

BASE = "a" * 64


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    names = ("weight/bert.pooler.dense.weight", "exp_avg/bert.pooler.dense.weight")
    return {name: torch.randn(16, 16, generator=generator) for name in names}


def commit(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.commit(folder, step, tensors(step), {"base_sha256": BASE, "engine": {"optimizer_steps": [step]}})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def flip_bit(path: Path, at: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: cut(p / "state.safetensors"), "state.safetensors has .* bytes, its manifest says"),
    "bit flipped": (lambda p: flip_bit(p / "state.safetensors", 0.9), "does not have the manifest's sha256"),
    "header flipped": (lambda p: flip_bit(p / "state.safetensors", 0.0), "does not have the manifest's sha256"),
    "without state": (lambda p: (p / "state.safetensors").unlink(), "not readable"),
    "without manifest": (lambda p: (p / "manifest.json").unlink(), "not readable"),
    "manifest empty": (lambda p: (p / "manifest.json").write_text(""), "not readable"),
    "manifest cut": (lambda p: (p / "manifest.json").write_text('{"step": 8, "by'), "not readable"),
    "manifest not text": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\x00"), "not readable"),
    "manifest no object": (lambda p: (p / "manifest.json").write_text("null"), "not readable"),
    "manifest without a key": (lambda p: (p / "manifest.json").write_text('{"step": 8}'), "not readable"),
    "of another base": (lambda p: edit_manifest(p, base_sha256="b" * 64), "belongs to another stage base"),
}


def test_committed_tensors_and_numbers_come_back(tmp_path: Path) -> None:
    commit(tmp_path / "checkpoints", 4)
    found, passed_over = checkpoint.newest_valid(tmp_path / "checkpoints", BASE)
    assert found is not None
    assert passed_over == []
    assert found.step == found.manifest["step"] == 4
    assert found.manifest["engine"] == {"optimizer_steps": [4]}
    loaded = found.tensors()
    assert loaded.keys() == tensors(4).keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(4).items())


def test_newest_two_are_kept(tmp_path: Path) -> None:
    commit(tmp_path, 8, 96, 104)
    assert names(tmp_path) == ["step-00000096", "step-00000104"]
    commit(tmp_path, 1000)
    assert names(tmp_path) == ["step-00000104", "step-00001000"]
    found, _ = checkpoint.newest_valid(tmp_path, BASE)
    assert found is not None
    assert found.step == 1000


def test_commit_removes_later_ones_that_were_passed_over(tmp_path: Path) -> None:
    commit(tmp_path, 4, 8)
    cut(tmp_path / "step-00000008/state.safetensors")
    commit(tmp_path, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


def test_step_committed_again_replaces_the_damaged_one(tmp_path: Path) -> None:
    commit(tmp_path, 4, 8)
    cut(tmp_path / "step-00000008/state.safetensors")
    commit(tmp_path, 8)
    found, passed_over = checkpoint.newest_valid(tmp_path, BASE)
    assert found is not None
    assert (found.step, passed_over) == (8, [])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_with_a_reason(tmp_path: Path, damage: str) -> None:
    commit(tmp_path, 4, 8)
    spoil, reason = DAMAGES[damage]
    spoil(tmp_path / "step-00000008")
    found, (line,) = checkpoint.newest_valid(tmp_path, BASE)
    assert found is not None
    assert found.step == 4
    assert line.startswith(f"checkpoint {tmp_path / 'step-00000008'} passed over: ")
    assert re.search(reason, line)


def test_nothing_valid_is_nothing(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path / "none", BASE) == (None, [])
    commit(tmp_path, 4, 8)
    found, passed_over = checkpoint.newest_valid(tmp_path, "c" * 64)
    assert found is None
    assert [line.split()[1].rsplit("-", 1)[1] for line in passed_over] == ["00000008", "00000004"]


@pytest.mark.parametrize("midway", ["before the state", "before the manifest", "before the rename"])
def test_killed_commit_leaves_no_folder_of_its_name(tmp_path: Path, midway: str) -> None:
    commit(tmp_path, 4)
    child = os.fork()
    if child == 0:

        def kill(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if midway == "before the state":
            checkpoint.write_tensors = kill
        elif midway == "before the manifest":
            checkpoint.write_json = kill
        else:
            os.rename = kill
        commit(tmp_path, 8)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "step-00000008").exists()
    found, passed_over = checkpoint.newest_valid(tmp_path, BASE)
    assert found is not None
    assert (found.step, passed_over) == (4, [])
    commit(tmp_path, 8, 12)
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["step-00000008", "step-00000012"]


def test_a_disk_that_is_full_is_an_oserror_and_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("mslt.models.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        commit(tmp_path / "checkpoints", 4, {"weight/a": torch.zeros(2)}, {})
    assert list((tmp_path / "checkpoints").iterdir()) == []
