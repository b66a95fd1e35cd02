"""Arrays made once on a machine: mapped by all, made anew when damaged, never in the way where no file can be."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest

from mslt.config import DataConfig
from mslt.data import cache
from mslt.data.cache import Arrays, cached, discard
from mslt.data.loader import Samples
from mslt.data.shards import open_shards

CORPUS = "0123456789abcdef0123456789abcdef"
KEY = {"epoch": 3, "seed": 0}


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


def test_discarded_files_go_and_what_is_mapped_stays(folder: Path) -> None:
    mapped = cached(CORPUS, "train-epoch", KEY, Maker())
    discard(CORPUS, "train-epoch", KEY)
    assert not list(folder.rglob("*.arrays"))
    assert same(mapped, Maker()())
    discard(CORPUS, "train-epoch", KEY)


def test_where_no_file_can_be_the_arrays_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("MSLT_CACHE", str(tmp_path / "a file" / "cache"))
    make = Maker()
    assert same(cached(CORPUS, "train-epoch", KEY, make), Maker()())
    assert make.times == 1


def test_a_full_disk_costs_the_file_not_the_arrays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mslt.files.os.fsync", full)
    make = Maker()
    assert same(cached(CORPUS, "train-epoch", KEY, make), Maker()())
    assert make.times == 1
    assert not list(folder.rglob("*.arrays*"))


def make_slowly(told: Path) -> Arrays:
    with open(told, "a") as file:
        file.write("x")
    return {"big": np.random.default_rng(0).random(3_000_000)}


def ask(told: Path) -> float:
    return float(cached(CORPUS, "train-epoch", KEY, lambda: make_slowly(told))["big"].sum())


def test_one_process_makes_and_the_others_wait(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sums = pool.map(ask, [tmp_path / "told"] * 4, chunksize=1)
    assert len(set(sums)) == 1
    assert (tmp_path / "told").read_text() == "x"


# The order of the data through the cache


def batch_of(shards: Path, length: int = 32) -> dict[str, list]:
    samples = Samples(open_shards(shards, "train"), DataConfig(shards="", max_predictions=5), length, 0)
    return {name: tensor.tolist() for name, tensor in samples.batch([0, 1, 9000, 17_000]).items()}


def test_samples_are_the_same_from_the_cache(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = batch_of(shards)
    assert not folder.exists(), "small splits leave no file"
    monkeypatch.setattr("mslt.data.shards.SMALL_SENTENCES", 0)
    assert batch_of(shards) == in_memory
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.arrays")}
    assert batch_of(shards) == in_memory
    assert made == {path: path.stat().st_mtime_ns for path in folder.rglob("*.arrays")}
    assert sum("train-sentences" in path.name for path in made) == 1
    assert sum("epoch-size" in path.name for path in made) >= 3
    assert sum("train-epoch-" in path.name and "size" not in path.name for path in made) <= 2, "old epochs go"
    batch_of(shards, length=48)
    assert len(list(folder.rglob("*.arrays"))) > len(made), "another length is another index"


def test_cached_samples_can_be_sent_to_a_spawned_worker(
    shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mslt.data.shards.SMALL_SENTENCES", 0)
    samples = Samples(open_shards(shards, "train"), DataConfig(shards="", max_predictions=5), 32, 0)
    first = samples.batch([5])
    sent = pickle.dumps(samples)
    assert len(sent) < 20_000, "no index travels"
    assert (pickle.loads(sent).batch([5])["input_ids"] == first["input_ids"]).all()
