"""Datasets through `datasets`, from folders the tests write: no network."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import hub
from data_prep.documents import Document
from data_prep.recipe import HubSource
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
        ("set", None, n, n + 1) for n in range(3)
    ]
    assert all(part.size_bytes > 0 for part in parts)
    assert list(hub.read_part(asked, parts[1])) == [
        Document("set#1-0", "First of 1.\nIts second.", 25),
        Document("set#1-1", "", 0, "empty"),
        Document("set#1-2", "", 0, "empty"),
        Document("set#1-3", "", 3, "damaged"),
        Document("set#1-4", "é", 2),
    ]


def test_max_documents_counts_over_all_shards(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set")
    asked = source(folder, max_documents=7)
    (part,) = hub.list_parts(asked)
    assert (part.start, part.end) == (0, 3)
    everything = read(source(folder))
    assert [(d.text, d.dropped) for d in read(asked)] == [(d.text, d.dropped) for d in everything[:7]]
    assert [d.key for d in read(asked)] == [f"set#0-{n}" for n in range(7)]


def test_json_lines_dataset_with_its_own_column(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"body": f"Row {n}.", "n": n}) for n in range(3)))
    asked = source(tmp_path, split="test", column="body")
    assert [document.text for document in read(asked)] == ["Row 0.", "Row 1.", "Row 2."]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"split": "validation"}, "Bad split: validation"),
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
