"""Arrays made once on a machine: mapped by all, made anew when damaged, never in the way where no file can be."""

import fcntl
import inspect
import multiprocessing
import os
import pickle
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from mslt.config import DataConfig
from mslt.data import cache
from mslt.data.cache import Arrays, cached
from mslt.data.loader import Samples
from mslt.data.order import INDEX_VERSION, EpochIndex, SampleOrder
from mslt.data.shards import open_shards

CORPUS = "0123456789abcdef0123456789abcdef"
KEY = {"epoch": 3, "seed": 0}
meeting: list[Barrier] = []  # one, of the processes started below


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSLT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Arrays:
        self.times += 1
        return {
            "start": np.arange(1001, dtype=np.uint32),
            "size": np.arange(7, dtype=np.uint16),
            "no": np.empty(0, int),
        }


def same(one: Arrays, other: Arrays) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and (one[name] == other[name]).all() for name in one
    )


def the_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.arrays")
    return path


def test_what_was_made_is_mapped_afterwards(folder: Path) -> None:
    make = Maker()
    for _ in range(3):
        assert same(cached(CORPUS, "train-epoch", KEY, make), Maker()())
    assert make.times == 1
    mapped = cached(CORPUS, "train-epoch", KEY, make)["start"]
    assert not mapped.flags.owndata
    assert not mapped.flags.writeable
    assert mapped.ctypes.data % cache.ALIGNMENT_BYTES == 0
    assert the_file(folder).parent == folder / CORPUS[:16]


@pytest.mark.parametrize(
    "changed", [("f" * 32, "train-epoch", KEY), (CORPUS, "validation-epoch", KEY), (CORPUS, "train-epoch", {"seed": 1})]
)
def test_every_part_of_the_key_counts(changed: tuple[str, str, dict[str, int]]) -> None:
    make = Maker()
    cached(CORPUS, "train-epoch", KEY, make)
    cached(*changed, make)
    assert make.times == 2


def cut(data: bytes) -> bytes:
    return data[:-100]


def flipped(data: bytes) -> bytes:
    return data[:-700] + bytes([data[-700] ^ 1]) + data[-699:]


def of_another_key(data: bytes) -> bytes:
    return data.replace(b'"epoch": 3', b'"epoch": 4')


@pytest.mark.parametrize(
    "damage",
    [cut, flipped, of_another_key, lambda _: b"", lambda data: data[:50], lambda data: data + b"x", lambda _: b"[]\n-"],
)
def test_a_damaged_file_is_made_anew(folder: Path, damage: object) -> None:
    make = Maker()
    cached(CORPUS, "train-epoch", KEY, make)
    whole = the_file(folder).read_bytes()
    the_file(folder).write_bytes(damage(whole))  # type: ignore[operator]
    assert same(cached(CORPUS, "train-epoch", KEY, make), Maker()())
    assert make.times == 2
    assert the_file(folder).read_bytes() == whole


def test_arrays_grow_and_what_is_mapped_stays(folder: Path) -> None:
    def numbers(count: int) -> np.ndarray:
        made = cached(CORPUS, "sizes", KEY, lambda: {"n": np.arange(count)}, lambda found: len(found["n"]) >= count)
        return made["n"]

    three = numbers(3)
    assert numbers(9).tolist() == list(range(9))
    assert numbers(2).tolist() == list(range(9)), "what is there is enough"
    assert three.tolist() == [0, 1, 2]
    the_file(folder).unlink()
    assert numbers(1).tolist() == [0]
    assert three.tolist() == [0, 1, 2]


def test_files_unused_for_a_week_go_when_another_is_written(folder: Path) -> None:
    for epoch in range(3):
        cached(CORPUS, "train-epoch", {"epoch": epoch}, Maker())
    (folder / "mine" / CORPUS).mkdir(parents=True)
    foreign = [folder / "mine" / "x-0123456789abcdef.json", folder / CORPUS[:16] / "notes.arrays", folder / "a.arrays"]
    for path in foreign:
        path.touch()
    for path in folder.rglob("*.*"):
        os.utime(path, (0, time.time() - 8 * 24 * 3600))
    make = Maker()
    cached(CORPUS, "train-epoch", {"epoch": 1}, make)
    assert make.times == 0
    assert len(list(folder.rglob("train-epoch-*.arrays"))) == 3, "reading deletes nothing"
    cached(CORPUS, "train-epoch", {"epoch": 3}, make)
    cached(CORPUS, "train-epoch", {"epoch": 1}, make)
    assert make.times == 1, "opened again, so kept"
    assert len(list(folder.rglob("train-epoch-*.arrays"))) == 2
    assert all(path.exists() for path in foreign)


# Where no file can be


def is_told(capsys: pytest.CaptureFixture[str], folder: Path, reason: str) -> bool:
    """A single warning, with the remedy."""
    told = capsys.readouterr().err.splitlines()
    start = f"warning: the sample index cannot be kept in {folder} ({reason}): "
    return len(told) == 1 and told[0].startswith(start) and "set MSLT_CACHE to a folder of this machine" in told[0]


def test_where_no_file_can_be_the_arrays_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("MSLT_CACHE", str(tmp_path / "a file" / "cache"))
    make = Maker()
    assert same(cached(CORPUS, "train-epoch", KEY, make), Maker()())
    assert make.times == 1
    assert same(cached(CORPUS, "train-epoch", KEY, make), Maker()())
    assert is_told(capsys, tmp_path / "a file" / "cache", "Not a directory")


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_the_file_not_the_arrays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mslt.files.os.fsync", full_disk)
    make = Maker()
    assert same(cached(CORPUS, "train-epoch", KEY, make), Maker()())
    assert make.times == 1
    assert not list(folder.rglob("*.arrays*"))
    cached(CORPUS, "train-epoch", KEY, make)
    assert is_told(capsys, folder, "No space left on device")


def test_trouble_in_the_making_is_the_callers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def fails() -> Arrays:
        asked.append(1)
        raise FileNotFoundError("train-00000.arrow")

    with pytest.raises(FileNotFoundError, match=r"train-00000\.arrow"):
        cached(CORPUS, "train-epoch", KEY, fails)
    assert len(asked) == 1
    assert capsys.readouterr().err == ""
    assert same(cached(CORPUS, "train-epoch", KEY, Maker()), Maker()()), "and the lock is free again"


def test_by_default_the_files_are_in_a_temporary_folder_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MSLT_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cached(CORPUS, "train-epoch", KEY, Maker())
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"mslt-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert the_file(folder)


@pytest.mark.parametrize("whose", ["another's", "anyone's", "linked", "a file"])
def test_a_temporary_folder_that_others_may_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], whose: str
) -> None:
    uid = os.getuid() + (whose == "another's")
    monkeypatch.delenv("MSLT_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("mslt.data.cache.os.getuid", lambda: uid)
    folder = tmp_path / f"mslt-{uid}"
    if whose == "linked":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif whose == "a file":
        folder.touch(mode=0o600)
    else:
        folder.mkdir()
        folder.chmod(0o777 if whose == "anyone's" else 0o700)
    assert same(cached(CORPUS, "train-epoch", KEY, Maker()), Maker()())
    assert not list(tmp_path.rglob("*.arrays"))
    assert is_told(capsys, folder, "not a folder that this user alone may write")


# Several processes


def make_slowly(told: Path) -> Arrays:
    with open(told, "a") as file:
        file.write("x")
    return {"big": np.random.default_rng(0).random(3_000_000)}


def ask(told: Path) -> float:
    return float(cached(CORPUS, "train-epoch", KEY, lambda: make_slowly(told))["big"].sum())


def test_one_process_makes_and_the_others_wait(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        sums = pool.map(ask, [tmp_path / "told"] * 4, chunksize=1)
    assert len(set(sums)) == 1
    assert (tmp_path / "told").read_text() == "x"


def test_files_are_read_with_the_lock_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, times = cache._read, []

    def watched(path: Path, key: dict) -> Arrays | None:
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        times.append(1)
        return read(path, key)

    monkeypatch.setattr(cache, "_read", watched)
    cached(CORPUS, "train-epoch", KEY, Maker())
    assert len(times) == 2, "before and after"


def ask_for_what_cannot_be_kept(told: Path) -> float:
    def make() -> Arrays:
        with open(told, "a") as file:
            file.write("x")
        if told.read_text() == "x":
            time.sleep(1.5)  # until the others wait
        else:
            meeting[0].wait(timeout=20)  # broken if they make it one by one
        return {"few": np.arange(10)}

    return float(cached(CORPUS, "train-epoch", KEY, make)["few"].sum())


def on_a_full_disk(barrier: Barrier) -> None:
    meeting.append(barrier)
    os.fsync = full_disk


def test_what_cannot_be_kept_is_not_made_one_by_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may never end
    with context.Pool(4, on_a_full_disk, (context.Barrier(3),)) as pool:
        assert pool.map(ask_for_what_cannot_be_kept, [tmp_path / "told"] * 4, chunksize=1) == [45.0] * 4
    assert (tmp_path / "told").read_text() == "xxxx"


# The order of the data through the cache


def batch_of(shards: Path, length: int = 32) -> dict[str, list]:
    samples = Samples(open_shards(shards, "train"), DataConfig(shards="", max_predictions=5), length, 0)
    return {name: tensor.tolist() for name, tensor in samples.batch([0, 1, 9000, 17_000]).items()}


def test_samples_are_the_same_from_the_cache(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = batch_of(shards)
    assert not folder.exists(), "small splits leave no file"
    monkeypatch.setattr("mslt.data.shards.SMALL_SENTENCES", 0)
    assert batch_of(shards) == in_memory
    made = {path: path.stat().st_ino for path in folder.rglob("*.arrays")}
    assert batch_of(shards) == in_memory
    assert made == {path: path.stat().st_ino for path in folder.rglob("*.arrays")}
    names = sorted(path.name[: -len("-0123456789abcdef.arrays")] for path in made)
    assert names.count("train-sentences") == names.count("train-epoch-sizes") == 1
    assert len(names) == 2 + names.count("train-epoch")
    batch_of(shards, length=48)
    assert len(list(folder.rglob("*.arrays"))) > len(made), "another length is another index"


class Setting(NamedTuple):
    """SampleOrder's arguments, and the epoch that is asked for."""

    shards: str = "train"
    sequence_length: int = 32
    short_sequence_probability: float = 0.1
    seed: int = 0
    next_sentence_prediction: bool = True
    epoch: int = 0

    def asked(self, folder: Path) -> tuple[list[list[int]], int]:
        """The epoch's index and the size of the next one, which is counted, not shuffled."""
        split, *options, epoch = self
        order = SampleOrder(open_shards(folder, split), *options)  # type: ignore[arg-type]
        return [column.tolist() for column in order.index(epoch)], order.num_samples(epoch + 1)


# (one, other): alike but for one argument. Without next-sentence prediction a sequence holds one special token less.
CHANGES = {
    "shards": (Setting(), Setting(shards="validation")),
    "sequence_length": (Setting(), Setting(sequence_length=33)),
    "short_sequence_probability": (Setting(), Setting(short_sequence_probability=0.2)),
    "seed": (Setting(), Setting(seed=1)),
    "next_sentence_prediction": (Setting(), Setting(sequence_length=31, next_sentence_prediction=False)),
    "epoch": (Setting(), Setting(epoch=1)),
}


def test_every_argument_of_the_order_has_a_change_below() -> None:
    assert [*inspect.signature(SampleOrder).parameters, "epoch"] == list(Setting._fields) == list(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_no_index_is_taken_for_another(shards: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    one, other = CHANGES[name]
    in_memory = [setting.asked(shards) for setting in (one, other)]
    assert in_memory[0][0] != in_memory[1][0]
    monkeypatch.setattr("mslt.data.shards.SMALL_SENTENCES", 0)
    assert [setting.asked(shards) for setting in (one, other)] == in_memory
    assert [setting.asked(shards) for setting in (one, other)] == in_memory


def test_another_version_of_the_rules_makes_new_files(
    shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mslt.data.shards.SMALL_SENTENCES", 0)
    Setting().asked(shards)
    assert len(list(folder.rglob("train-epoch-*.arrays"))) == 2
    monkeypatch.setattr("mslt.data.order.INDEX_VERSION", INDEX_VERSION + 1)
    Setting().asked(shards)
    assert len(list(folder.rglob("train-epoch-*.arrays"))) == 4


def test_epochs_once_counted_are_not_chunked_again(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mslt.data.order.UNCOUNTED_SENTENCES", 0)
    train = open_shards(shards, "train")
    chunks, chunked = SampleOrder._chunks, []

    def watched(order: SampleOrder, epoch: int) -> EpochIndex:
        chunked.append(epoch)
        return chunks(order, epoch)

    monkeypatch.setattr(SampleOrder, "_chunks", watched)
    size = SampleOrder(train, 32, 0.1, 0).num_samples(0)
    positions = [np.array([7 * size]), np.array([11 * size])]
    expected = [SampleOrder(train, 32, 0.1, 0).locate(position) for position in positions]
    last = expected[1][0].item()
    assert chunked == list(range(last + 1)), "each once, the later ones on top of the earlier"
    assert [SampleOrder(train, 32, 0.1, 0).locate(position) for position in positions] == expected
    assert len(chunked) == last + 1
    assert len(list(folder.rglob("*.arrays"))) == 1
    monkeypatch.undo()
    in_memory = SampleOrder(train, 32, 0.1, 0)
    assert [in_memory.locate(position) for position in positions] == expected


def test_cached_samples_can_be_sent_to_a_spawned_worker(
    shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mslt.data.shards.SMALL_SENTENCES", 0)
    samples = Samples(open_shards(shards, "train"), DataConfig(shards="", max_predictions=5), 32, 0)
    first = samples.batch([5])
    sent = pickle.dumps(samples)
    assert len(sent) < 20_000, "no index travels"
    assert (pickle.loads(sent).batch([5])["input_ids"] == first["input_ids"]).all()
