"""In-stage checkpoints: of any number of ranks, committed whole, two kept, never a damaged one loaded, nothing run."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mslt.engine import checkpoint
from mslt.engine.checkpoint import Checkpoint, Writer
from mslt.failures import kind_of
from mslt.models import factory
from mslt.models.checkpoint import save_model_folder
from mslt.plan import Plan

BASE = "a" * 64
PLAN = "d" * 64
WAIT_S = 60
NUMEL = {"bert.pooler.dense.weight": 256, "bert.embeddings.LayerNorm.bias": 7}
KINDS = ("weight", "exp_avg", "exp_avg_sq")
Tensors = dict[str, torch.Tensor]


def whole_tensors(step: int) -> dict[tuple[str, str], torch.Tensor]:
    """Every kind of every parameter, flattened."""
    generator = torch.Generator().manual_seed(step)
    found = {(kind, name): torch.randn(numel, generator=generator) for kind in KINDS for name, numel in NUMEL.items()}
    return found | {("step", name): torch.tensor([step]) for name in NUMEL}


def shares(step: int, world_size: int, seed: int = 0) -> list[Tensors]:
    """What each rank of ZeRO would hand over: every tensor cut at as many places as there are borders, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    ranks: list[Tensors] = [{} for _ in range(world_size)]
    for (kind, name), tensor in whole_tensors(step).items():
        inner = torch.randint(0, len(tensor) + 1, (world_size - 1,), generator=generator).tolist()
        for rank, (begin, end) in enumerate(pairwise([0, *sorted(inner), len(tensor)])):
            if begin < end:
                ranks[rank][f"{kind}/{name}/{begin}"] = tensor[begin:end].clone()
    return ranks


def commit(folder: Path, *steps: int) -> None:
    for step in steps:
        (tensors,) = shares(step, 1)
        checkpoint.commit(
            folder, step, tensors, {"base_sha256": BASE, "plan": PLAN, "engine": {"left_out_steps": step}}
        )


def by_hand(folder: Path, step: int, ranks: list[Tensors]) -> Path:
    """The format, written without our writer."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    for rank, tensors in enumerate(ranks):
        save_file(tensors, path / f"rank-{rank}.safetensors")
    (path / "manifest.json").write_text(
        json.dumps({"step": step, "files": listed(path), "base_sha256": BASE, "plan": PLAN})
    )
    return path


def listed(path: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in path.iterdir() if file.name != "manifest.json")
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in files
    }


def newest(folder: Path) -> Checkpoint:
    found, passed_over = checkpoint.newest_valid(folder, BASE, PLAN)
    assert passed_over == []
    assert found is not None
    return found


def assert_holds(found: Checkpoint, step: int) -> None:
    assert found.step == found.manifest["step"] == step
    with found.open() as opened:
        for kind in (*KINDS, "step"):
            tensors = opened.whole(kind)
            assert tensors.keys() == NUMEL.keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, whole_tensors(step)[kind, name]), (kind, name)


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


def swap(one: Path, other: Path) -> None:
    contents = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(contents)


# What is in it


def test_committed_tensors_and_numbers_come_back(tmp_path: Path) -> None:
    commit(tmp_path / "checkpoints", 4)
    found = newest(tmp_path / "checkpoints")
    assert_holds(found, 4)
    assert found.manifest["engine"] == {"left_out_steps": 4}


def test_format_is_the_documented_one(tmp_path: Path) -> None:
    commit(tmp_path, 4)
    path = tmp_path / "step-00000004"
    assert names(tmp_path) == [path.name]
    assert names(path) == ["manifest.json", "rank-0.safetensors"]
    held = load_file(path / "rank-0.safetensors")
    assert sorted(held) == sorted(f"{kind}/{name}/0" for kind in (*KINDS, "step") for name in NUMEL)
    assert {tensor.dtype for key, tensor in held.items() if not key.startswith("step/")} == {torch.float32}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest == {
        "step": 4,
        "files": listed(path),
        "base_sha256": BASE,
        "plan": PLAN,
        "engine": {"left_out_steps": 4},
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_run_of_elements_is_read_across_the_files_of_all_ranks(tmp_path: Path, world_size: int, seed: int) -> None:
    by_hand(tmp_path, 4, shares(4, world_size, seed))
    found = newest(tmp_path)
    assert_holds(found, 4)
    generator = torch.Generator().manual_seed(100 + seed)
    with found.open() as opened:
        for (kind, name), tensor in whole_tensors(4).items():
            runs = [(0, len(tensor)), (0, 1), (len(tensor) - 1, 1)]
            for _ in range(30):
                begin, end = sorted(torch.randint(0, len(tensor) + 1, (2,), generator=generator).tolist())
                runs += [(begin, end - begin)] if begin < end else []
            for start, numel in runs:
                read = opened.read(kind, name, start, numel)
                assert read is not None
                assert torch.equal(read, tensor[start : start + numel]), (seed, kind, name, start, numel)


def test_pieces_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    tensor = torch.arange(120.0)  # as text, 100 comes before 20
    borders = [0, 20, 100, 120]
    ranks = [{f"weight/a/{begin}": tensor[begin:end]} for begin, end in pairwise(borders)]
    by_hand(tmp_path, 1, [ranks[1], ranks[2], ranks[0]])
    with newest(tmp_path).open() as opened:
        assert torch.equal(opened.whole("weight")["a"], tensor)
        read = opened.read("weight", "a", 19, 82)
        assert read is not None
        assert torch.equal(read, tensor[19:101])


def test_what_was_not_saved_is_none(tmp_path: Path) -> None:
    by_hand(tmp_path, 4, [{"weight/a/0": torch.ones(3)}, {"weight/a/3": torch.ones(3)}])
    with newest(tmp_path).open() as opened:
        for kind, name, start in (("exp_avg", "a", 0), ("weight", "b", 0), ("weight", "a", 6)):
            assert opened.read(kind, name, start, 2) is None
        assert opened.whole("exp_avg") == {}, "asking for a tensor does not make one"
        assert list(opened.whole("weight")) == ["a"]


def test_a_tensor_with_a_hole_is_never_handed_out(tmp_path: Path) -> None:
    by_hand(tmp_path, 4, [{"weight/a/0": torch.ones(3)}, {"weight/a/5": torch.ones(3)}])
    with newest(tmp_path).open() as opened:
        for start, numel in ((0, 8), (2, 4), (4, 3), (6, 4)):
            with pytest.raises(AssertionError, match=rf"weight of a: \d of {numel} elements from {start} on"):
                opened.read("weight", "a", start, numel)
        read = opened.read("weight", "a", 5, 3)
        assert read is not None
        assert len(read) == 3


def test_nothing_to_hand_over_is_a_checkpoint_too(tmp_path: Path) -> None:
    checkpoint.commit(tmp_path, 0, {}, {"base_sha256": BASE, "plan": PLAN})
    with newest(tmp_path).open() as opened:
        assert opened.whole("exp_avg") == {}
        assert opened.read("weight", "a", 0, 2) is None


# Which are kept


def test_newest_two_are_kept(tmp_path: Path) -> None:
    commit(tmp_path, 8, 96, 104)
    assert names(tmp_path) == ["step-00000096", "step-00000104"]
    commit(tmp_path, 1000)
    assert names(tmp_path) == ["step-00000104", "step-00001000"]
    assert newest(tmp_path).step == 1000


def test_commit_removes_later_ones_that_were_passed_over(tmp_path: Path) -> None:
    commit(tmp_path, 4, 8)
    cut(tmp_path / "step-00000008/rank-0.safetensors")
    commit(tmp_path, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


def test_step_committed_again_replaces_the_damaged_one(tmp_path: Path) -> None:
    by_hand(tmp_path, 8, shares(8, 3))
    cut(tmp_path / "step-00000008/rank-0.safetensors")
    commit(tmp_path, 8)
    assert_holds(newest(tmp_path), 8)
    assert names(tmp_path / "step-00000008") == ["manifest.json", "rank-0.safetensors"], "nothing of the old one"


@pytest.mark.parametrize("later", [[12], [12, 16]])
def test_what_is_committed_stays_though_only_later_ones_that_were_passed_over_are_there(
    tmp_path: Path, later: list[int]
) -> None:
    commit(tmp_path, *later)
    commit(tmp_path, 0)
    assert names(tmp_path) == ["step-00000000"]


# Damage: of step 8, whose state lies in the files of two ranks

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: cut(p / "rank-0.safetensors"), "rank-0.safetensors has .* bytes, its manifest says"),
    "bit flipped": (lambda p: flip_bit(p / "rank-0.safetensors", 0.9), "does not have the manifest's sha256"),
    "header flipped": (lambda p: flip_bit(p / "rank-0.safetensors", 0.0), "does not have the manifest's sha256"),
    "one of two truncated": (lambda p: cut(p / "rank-1.safetensors"), "rank-1.safetensors has .* bytes"),
    "one of two torn": (lambda p: flip_bit(p / "rank-1.safetensors", 0.5), "rank-1.* not have the manifest's sha256"),
    "one of two empty": (lambda p: (p / "rank-1.safetensors").write_bytes(b""), "rank-1.safetensors has 0 bytes"),
    "one of two missing": (lambda p: (p / "rank-1.safetensors").unlink(), "not readable .*rank-1.safetensors"),
    "ranks swapped": (lambda p: swap(p / "rank-0.safetensors", p / "rank-1.safetensors"), "rank-0.safetensors"),
    "without state": (lambda p: [f.unlink() for f in p.glob("rank-*")], "not readable .*rank-0.safetensors"),
    "a folder for a file": (
        lambda p: [(p / "rank-1.safetensors").unlink(), (p / "rank-1.safetensors").mkdir()],
        "rank-1.safetensors",
    ),
    "without manifest": (lambda p: (p / "manifest.json").unlink(), "not readable"),
    "manifest empty": (lambda p: (p / "manifest.json").write_text(""), "not readable"),
    "manifest cut": (lambda p: (p / "manifest.json").write_text('{"step": 8, "by'), "not readable"),
    "manifest not text": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\x00"), "not readable"),
    "manifest no object": (lambda p: (p / "manifest.json").write_text("null"), "not readable"),
    "manifest without a key": (lambda p: (p / "manifest.json").write_text('{"step": 8}'), "not readable"),
    "manifest of one file": (lambda p: edit_manifest(p, files=None, bytes=8, sha256="b" * 64), "not readable"),
    "files no object": (lambda p: edit_manifest(p, files=["rank-0.safetensors"]), "not readable"),
    "file without a hash": (lambda p: edit_manifest(p, files={"rank-0.safetensors": {}}), "not readable .*bytes"),
    "file without a name": (lambda p: edit_manifest(p, files={"": {"bytes": 1, "sha256": BASE}}), "has .* bytes"),
    "step no number": (lambda p: edit_manifest(p, step="8"), "not readable .*step '8'"),
    "of another plan": (lambda p: edit_manifest(p, plan="e" * 64), "belongs to another plan"),
    "of another base": (lambda p: edit_manifest(p, base_sha256="b" * 64), "belongs to another stage base"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_with_a_reason(tmp_path: Path, damage: str) -> None:
    for step in (4, 8):
        by_hand(tmp_path, step, shares(step, 2))
    assert newest(tmp_path).step == 8
    spoil, reason = DAMAGES[damage]
    spoil(tmp_path / "step-00000008")
    found, (line,) = checkpoint.newest_valid(tmp_path, BASE, PLAN)
    assert found is not None
    assert_holds(found, 4)
    assert line.startswith(f"checkpoint {tmp_path / 'step-00000008'} passed over: ")
    assert re.search(reason, line), line


def test_nothing_valid_is_nothing(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path / "none", BASE, PLAN) == (None, [])
    commit(tmp_path, 4, 8)
    found, passed_over = checkpoint.newest_valid(tmp_path, "c" * 64, PLAN)
    assert found is None
    assert [line.split()[1].rsplit("-", 1)[1] for line in passed_over] == ["00000008", "00000004"]


# A stranger's checkpoint


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


STRANGERS: dict[str, Callable[[Path, Payload], object]] = {
    "a pickle under a safetensors name": lambda p, x: (p / "rank-0.safetensors").write_bytes(pickle.dumps(x)),
    "torch's own file under a safetensors name": lambda p, x: torch.save({"weight/a/0": x}, p / "rank-0.safetensors"),
    "a pickle for a second rank": lambda p, x: (p / "rank-1.safetensors").write_bytes(pickle.dumps(x)),
    "a pickle under its own name": lambda p, x: (p / "optimizer.pkl").write_bytes(pickle.dumps(x)),
    "torch's own file under its own name": lambda p, x: torch.save({"weight/a/0": x}, p / "optimizer.pt"),
    "an old torch file": lambda p, x: torch.save(x, p / "state.pt", _use_new_zipfile_serialization=False),
    "a pickle behind a header's length": lambda p, x: (p / "rank-0.safetensors").write_bytes(
        len(pickle.dumps(x)).to_bytes(8, "little") + pickle.dumps(x)
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_nothing_is_unpickled_whatever_the_manifest_says(tmp_path: Path, stranger: str) -> None:
    commit(tmp_path, 4, 8)
    path, mark = tmp_path / "step-00000008", tmp_path / "the payload ran"
    STRANGERS[stranger](path, Payload(mark))
    edit_manifest(path, files=listed(path))  # hashes and sizes agree
    found, (line,) = checkpoint.newest_valid(tmp_path, BASE, PLAN)
    assert found is not None
    assert_holds(found, 4)
    assert re.search(r"step-00000008 passed over: not readable \(.*header", line), line
    manifest = json.loads((path / "manifest.json").read_text())
    with pytest.raises(SafetensorError, match="header"), Checkpoint(path, 8, manifest).open():
        pass
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "or the payload were none"


def test_a_pickle_for_a_manifest_is_not_unpickled(tmp_path: Path) -> None:
    commit(tmp_path, 4)
    mark = tmp_path / "the payload ran"
    (tmp_path / "step-00000004/manifest.json").write_bytes(pickle.dumps(Payload(mark)))
    found, (line,) = checkpoint.newest_valid(tmp_path, BASE, PLAN)
    assert found is None
    assert "not readable" in line
    assert not mark.exists()


# Killed, or out of room


@pytest.mark.parametrize("midway", ["before the state", "before the manifest", "before the rename"])
def test_killed_commit_leaves_no_folder_of_its_name_and_the_next_clears_up(tmp_path: Path, midway: str) -> None:
    commit(tmp_path, 4)
    (tensors,) = shares(8, 1)
    child = os.fork()
    if child == 0:  # no torch from here on: after a fork its threads are gone

        def kill(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if midway == "before the state":
            checkpoint.write_tensors = kill
        elif midway == "before the manifest":
            checkpoint.write_json = kill
        else:
            os.rename = kill
        checkpoint.commit(tmp_path, 8, tensors, {"base_sha256": BASE, "plan": PLAN})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert names(tmp_path) == [".step-00000008.tmp", "step-00000004"]
    assert newest(tmp_path).step == 4
    commit(tmp_path, 12)
    assert names(tmp_path) == ["step-00000004", "step-00000012"]


def full_while_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(tensors: object, path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("mslt.models.checkpoint.save_file", save)


def full_while_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mslt.engine.checkpoint.os.fsync", sync)


def full_at_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, value: Any) -> None:
        path.write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", write)


FULL = {"saving": full_while_saving, "syncing": full_while_syncing, "the manifest": full_at_the_manifest}


@pytest.mark.parametrize("when", FULL)
def test_a_disk_that_is_full_is_an_oserror_and_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    commit(tmp_path, 4)
    FULL[when](monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        commit(tmp_path, 8)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000004"], "half a checkpoint would keep the disk full"
    commit(tmp_path, 8)
    assert_holds(newest(tmp_path), 8)


def test_a_full_disk_says_which_file_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_while_syncing(monkeypatch)
    with pytest.raises(OSError, match=r"make room and run the same command again: .*rank-0\.safetensors"):
        commit(tmp_path, 4)


def test_a_model_folder_on_a_full_disk_is_the_systems_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_plan: Plan
) -> None:
    def save(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save)
    model = factory.build(tiny_plan.model, 1, factory.initial_state(tiny_plan.model, 1, 0))
    with pytest.raises(OSError, match=r"make room and run the same command again: .*model") as raised:
        save_model_folder(tmp_path / "model", model, tmp_path, {}, "")
    assert raised.value.errno == errno.ENOSPC
    assert kind_of(raised.value) == "mistake", "it is not started again"
    assert not list(tmp_path.iterdir())


def test_a_file_over_the_systems_limit_is_an_oserror(tmp_path: Path) -> None:
    commit(tmp_path, 4)
    large = {"weight/a/0": torch.zeros(2**15)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # a real refusal of the system; half of it is written
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.commit(tmp_path, 8, large, {"base_sha256": BASE, "plan": PLAN})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000004"]


# Behind the step loop's back


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A group of this process; that of an engine's test, where one has run before in it, stays."""
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def writer(one_rank: None) -> Iterator[Writer]:
    made = Writer(0)
    yield made
    made.close()


class Gate:
    """Stands before the writing of a file: keeps the order of what passes, and lets nothing through until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.seen: list[str] = []
        write_tensors = checkpoint.write_tensors

        def gated(path: Path, tensors: Tensors) -> None:
            step = path.parent.name.removeprefix(".step-").removesuffix(".tmp").lstrip("0")
            self.seen.append(f"begin {step}")
            self.reached.set()
            assert self.open.wait(WAIT_S)
            write_tensors(path, tensors)
            self.seen.append(f"end {step}")

        monkeypatch.setattr(checkpoint, "write_tensors", gated)


def hand_over(writer: Writer, folder: Path, step: int) -> None:
    writer.write(folder, step, shares(step, 1)[0], {"base_sha256": BASE, "plan": PLAN})


def test_write_returns_before_the_file_is_there(
    tmp_path: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, gate = tmp_path / "checkpoints", Gate(monkeypatch)
    hand_over(writer, folder, 4)
    assert gate.reached.wait(WAIT_S)
    writer.raise_if_failed()  # does not wait
    assert gate.seen == ["begin 4"]
    assert checkpoint.newest_valid(folder, BASE, PLAN) == (None, [])
    gate.open.set()
    writer.wait()
    assert_holds(newest(folder), 4)
    assert names(folder) == ["step-00000004"]
    writer.wait()


def test_a_second_write_waits_for_the_first(tmp_path: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, gate = tmp_path / "checkpoints", Gate(monkeypatch)
    hand_over(writer, folder, 4)
    assert gate.reached.wait(WAIT_S)
    second = threading.Thread(target=hand_over, args=(writer, folder, 8))
    second.start()
    time.sleep(0.3)
    assert second.is_alive()
    assert gate.seen == ["begin 4"]
    gate.open.set()
    second.join(WAIT_S)
    assert not second.is_alive()
    writer.wait()
    assert gate.seen == ["begin 4", "end 4", "begin 8", "end 8"]
    assert names(folder) == ["step-00000004", "step-00000008"]
    assert_holds(newest(folder), 8)


@pytest.mark.parametrize("when", FULL)
def test_a_full_disk_is_raised_once_by_wait(
    tmp_path: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    folder = tmp_path / "checkpoints"
    hand_over(writer, folder, 4)
    writer.wait()
    FULL[when](monkeypatch)
    hand_over(writer, folder, 8)
    with pytest.raises(OSError, match=r"checkpoint not written: rank 0: .*No space left"):
        writer.wait()
    monkeypatch.undo()
    writer.wait()
    writer.raise_if_failed()
    assert names(folder) == ["step-00000004"]
    assert_holds(newest(folder), 4)
    hand_over(writer, folder, 8)
    writer.wait()
    assert_holds(newest(folder), 8)


def poll(writer: Writer) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        writer.raise_if_failed()
        time.sleep(0.01)


def test_a_failure_is_raised_by_the_next_call_whichever_it_is(
    tmp_path: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    with monkeypatch.context() as patched:
        full_while_saving(patched)
        hand_over(writer, folder, 4)
        with pytest.raises(OSError, match="not written"):
            poll(writer)
        hand_over(writer, folder, 4)
        with pytest.raises(OSError, match="not written"):
            hand_over(writer, folder, 8)
    writer.wait()
    assert names(folder) == [], "8 was not begun"


@pytest.mark.parametrize("fault", ["a file in its place", "no folder around it", "read-only"])
def test_a_folder_that_cannot_be_written_is_raised_once(
    tmp_path: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    folder = tmp_path / ("missing/checkpoints" if fault == "no folder around it" else "checkpoints")
    if fault == "a file in its place":
        folder.write_text("mine")
    if fault == "read-only":

        def refuse(*_: Any) -> None:  # permissions do not stop root
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(os, "mkdir", refuse)
    hand_over(writer, folder, 4)
    with pytest.raises(OSError, match=r"checkpoint not written: rank 0: .*(exists|No such|Read-only)"):
        writer.wait()
    writer.wait()
    assert fault != "a file in its place" or folder.read_text() == "mine"


def test_what_a_killed_run_left_goes_and_nothing_else(tmp_path: Path, writer: Writer) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000006.tmp").mkdir(parents=True)
    (folder / ".step-00000006.tmp/rank-0.safetensors").write_bytes(b"half")
    (folder / ".step-00000008.tmp").mkdir()
    (folder / ".step-00000008.tmp/rank-7.safetensors").write_bytes(b"of more ranks")
    (folder / "notes.txt").write_text("mine")
    hand_over(writer, folder, 8)
    writer.wait()
    assert names(folder) == ["notes.txt", "step-00000008"]
    assert names(folder / "step-00000008") == ["manifest.json", "rank-0.safetensors"]


def test_close_finishes_what_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_rank: None) -> None:
    gate, writer = Gate(monkeypatch), Writer(0)
    hand_over(writer, tmp_path / "checkpoints", 4)
    assert gate.reached.wait(WAIT_S)
    threading.Timer(0.1, gate.open.set).start()
    writer.close()
    assert_holds(newest(tmp_path / "checkpoints"), 4)
    torch.distributed.all_reduce(torch.ones(1))  # the loop's own group is still there


# Two ranks: each a process, started once for all of this


def two_ranks(rank: int, folder: Path) -> None:
    """One of them: every case in a folder of its own, and beside it what it raised."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=WAIT_S)
    )
    writer, about = Writer(rank), {"base_sha256": BASE, "plan": PLAN}
    for step in (4, 8, 12):
        writer.write(folder / "cut", step, shares(step, 2, seed=1)[rank], about | {"world_size": 2})
    writer.wait()
    writer.write(folder / "whole", 4, {} if rank else shares(4, 1)[0], about)
    writer.wait()
    for failing in (0, 1):
        where, said = folder / f"failing {failing}", ""
        writer.write(where, 4, shares(4, 2)[rank], about)
        writer.wait()
        with pytest.MonkeyPatch.context() as patched:
            if rank == failing:
                full_while_saving(patched)
            writer.write(where, 8, shares(8, 2)[rank], about)
            try:
                writer.wait()
            except OSError as error:
                said = str(error)
        (folder / f"failing {failing}, said by {rank}").write_text(said)
        writer.write(where, 12, shares(12, 2)[rank], about)
        writer.close()
        writer = Writer(rank)
    writer.close()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def written_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two ranks")
    context = multiprocessing.get_context("spawn")  # a fork after torch has started threads can hang
    ranks = [context.Process(target=two_ranks, args=(rank, folder), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(2 * WAIT_S)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return folder


def test_all_ranks_write_one_checkpoint(written_by_two: Path) -> None:
    folder = written_by_two / "cut"
    assert names(folder) == ["step-00000008", "step-00000012"]
    path = folder / "step-00000012"
    assert names(path) == ["manifest.json", "rank-0.safetensors", "rank-1.safetensors"]
    for rank, tensors in enumerate(shares(12, 2, seed=1)):
        held = load_file(path / f"rank-{rank}.safetensors")
        assert held.keys() == tensors.keys()
        assert all(torch.equal(held[key], tensor) for key, tensor in tensors.items())
    found = newest(folder)
    assert found.manifest == {"step": 12, "files": listed(path), "base_sha256": BASE, "plan": PLAN, "world_size": 2}
    assert_holds(found, 12)


def test_a_rank_with_nothing_writes_no_file(written_by_two: Path) -> None:
    path = written_by_two / "whole/step-00000004"
    assert names(path) == ["manifest.json", "rank-0.safetensors"]
    assert_holds(newest(path.parent), 4)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_is_raised_on_all(written_by_two: Path, failing: int) -> None:
    folder = written_by_two / f"failing {failing}"
    said = {(written_by_two / f"failing {failing}, said by {rank}").read_text() for rank in range(2)}
    (line,) = said
    assert re.fullmatch(rf"checkpoint not written: rank {failing}: .*No space left on.*rank-{failing}.*", line)
    assert names(folder) == ["step-00000004", "step-00000012"], "8 left nothing; 12 was finished by close"
    assert_holds(newest(folder), 12)
