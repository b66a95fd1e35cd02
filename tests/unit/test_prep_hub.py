"""Datasets through `datasets`, from folders the tests write: no network."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import hub
from data_prep.documents import Document
from data_prep.recipe import HubSource
from data_prep.sources import list_pieces
from mslt.errors import MsltError


@pytest.fixture(autouse=True)
def _read_anew() -> Iterator[None]:
    hub.load.cache_clear()
    yield
    hub.load.cache_clear()


def source(path: Path, **values: Any) -> HubSource:
    return HubSource(kind="hub", dataset=str(path), **values)


def read(asked: HubSource) -> list[Document]:
    return [document for part in hub.list_parts(asked) for document in hub.read_part(asked, part)]


def write_parquet(folder: Path, num_files: int = 3) -> Path:
    folder.mkdir()
    for index in range(num_files):
        texts = [f"First  of {index}.\n\nIts second.", None, "", f"N\0{index}", "é"]
        pq.write_table(pa.table({"id": range(5), "text": texts}), folder / f"train-{index}.parquet", row_group_size=2)
    return folder


def test_parquet_dataset_by_shards(tmp_path: Path) -> None:
    asked = source(write_parquet(tmp_path / "set"))
    parts = hub.list_parts(asked)
    assert [(part.name, part.path, part.start, part.end) for part in parts] == [
        (f"set@{hub.find_version(asked)}", None, n, n + 1) for n in range(3)
    ]
    assert all(part.size_bytes > 0 for part in parts)
    assert list(hub.read_part(asked, parts[1])) == [
        Document("First of 1.\nIts second.", 25),
        Document("", 0, "empty"),
        Document("", 0, "empty"),
        Document("", 3, "damaged"),
        Document("é", 2),
    ]


def test_changed_folder_is_another_dataset(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set")

    def identity() -> tuple[list[str], list[str]]:
        pieces = list_pieces((source(folder),), 1)
        return [part.name for piece in pieces for part in piece.parts], [piece.key for piece in pieces]

    seen = [identity()]
    os.utime(folder / "train-2.parquet", ns=(1, 1))
    seen.append(identity())
    (folder / "README.md").write_text("More.")
    seen.append(identity())
    (folder / "README.md").rename(folder / "readme.md")
    os.utime(folder / "readme.md", ns=(1, 1))
    seen.append(identity())
    assert identity() == seen[-1]
    folder.rename(tmp_path / "moved")
    assert hub.find_version(source(tmp_path / "moved")) in seen[-1][0][0]
    assert len({names[0] for names, _ in seen}) == len({keys[0] for _, keys in seen}) == len(seen)


def test_hub_dataset_is_read_at_the_commit_that_was_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {None: "a" * 40, "v1": "b" * 40}
    monkeypatch.setattr(
        hub.HfApi, "dataset_info", lambda self, name, revision, timeout: SimpleNamespace(sha=commits[revision])
    )
    read_at = []

    def load_dataset(*names: str, split: str, revision: str, streaming: bool) -> datasets.IterableDataset:
        read_at.append(revision)
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "One."}, {"text": None}, {"text": 1}]))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    asked = HubSource(kind="hub", dataset="some/set")
    (part,) = hub.list_parts(asked)
    assert part.name == f"some/set@{'a' * 40}"
    commits[None] = "c" * 40
    hub.load.cache_clear()
    assert list(hub.read_part(asked, part)) == [
        Document("One.", 4),
        Document("", 0, "empty"),
        Document("", 0, "damaged"),
    ]
    assert [p.name[-1] for p in hub.list_parts(HubSource(kind="hub", dataset="some/set", revision="v1"))] == ["b"]
    assert read_at == ["a" * 40, "a" * 40, "b" * 40]


@pytest.mark.parametrize(
    "error", [hub.httpx.ReadTimeout("timed out"), hub.httpx.RemoteProtocolError("cut off"), zlib.error("damaged")]
)
def test_stream_that_breaks_ends_in_one_message(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "One."}
        raise error

    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="a" * 40))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(MsltError, match=f"some/set/train: {error}; correct"):
        read(HubSource(kind="hub", dataset="some/set"))


def test_hub_that_does_not_answer_ends_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise hub.httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(hub.HfApi, "dataset_info", fail)
    with pytest.raises(MsltError, match=r"some/set/train: Name or service not known; .*without network"):
        hub.list_parts(HubSource(kind="hub", dataset="some/set"))


def test_files_that_name_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\nTwo.\n")
    assert [document.text for document in read(source(tmp_path))] == ["One.", "Two."]
    with pytest.raises(MsltError, match=r"no column 'body'; .*of text"):
        hub.list_parts(source(tmp_path, column="body"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_dataset_without_rows_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(MsltError, match=f"{tmp_path.name}(: holds no rows|/train: StopIteration)"):
        hub.list_parts(source(tmp_path))


def test_rows_of_another_type_end_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "by": null}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "y", "by": "me"}\n')
    with pytest.raises(MsltError, match=f"{tmp_path.name}/train: .*; correct"):
        read(source(tmp_path))


def test_damaged_gz_ends_in_one_message(tmp_path: Path) -> None:
    packed = gzip.compress("".join(f'{{"text": "{n} {n * n}"}}\n' for n in range(9000)).encode())
    for raw in (packed[:-20], packed[:5000] + b"\xff" * 99 + packed[5099:]):
        (tmp_path / "a.jsonl.gz").write_bytes(raw)
        with pytest.raises(MsltError, match=f"{tmp_path.name}/train: "):
            read(source(tmp_path))


def test_max_documents_counts_over_all_shards(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set")
    asked = source(folder, max_documents=7)
    (part,) = hub.list_parts(asked)
    assert (part.start, part.end) == (0, 3)
    everything = read(source(folder))
    assert [(d.text, d.dropped) for d in read(asked)] == [(d.text, d.dropped) for d in everything[:7]]


def test_json_lines_dataset_with_its_own_column(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"body": f"Row {n}.", "n": n}) for n in range(3)))
    asked = source(tmp_path, split="test", column="body")
    assert [document.text for document in read(asked)] == ["Row 0.", "Row 1.", "Row 2."]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"split": "validation"}, "Bad split: validation"),
        ({"revision": "main"}, "a local folder has no revision; leave"),
        ({"config": "20231101.en"}, "'20231101.en' not found"),
        ({"column": "body"}, "no column 'body'; set the source's column to one that does, of id, text"),
        ({"column": "id"}, "its column 'id' holds no text"),
    ],
)
def test_mistakes_are_named_with_the_remedy(tmp_path: Path, values: dict[str, str], said: str) -> None:
    with pytest.raises(MsltError, match=f"set.*{said}"):
        hub.list_parts(source(write_parquet(tmp_path / "set", 1), **values))


def test_no_such_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(MsltError, match=f"{path.name}/train: .*correct the source's dataset"):
            hub.list_parts(source(path))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MsltError, match=r"wikimedia/wikipedia/20231101\.en/train: .*without network name a local"):
        hub.list_parts(HubSource(kind="hub", dataset="wikimedia/wikipedia", config="20231101.en"))


def test_rows_of_another_shape_end_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"other": "x"}\n')
    with pytest.raises(MsltError, match="column names don't match"):
        read(source(tmp_path))


def test_damaged_file_ends_in_one_message(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set", 2)
    raw = (folder / "train-1.parquet").read_bytes()
    (folder / "train-1.parquet").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(MsltError, match="set/train: "):
        read(source(folder))
