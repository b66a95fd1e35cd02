"""Files of rows: each row is one document, and each byte is counted once, however a file is cut."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import rows, text
from data_prep.documents import MAX_DOCUMENT_BYTES, Document
from data_prep.recipe import FileSource
from mslt.errors import MsltError


def read(kind: str, path: Path, **column: str) -> list[Document]:
    source = FileSource(kind=kind, path=str(path), **column)  # type: ignore[arg-type]
    return [document for part in rows.list_parts(source) for document in rows.read_part(source, part)]


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def write_parquet(path: Path, texts: list[str | None] | pa.Array, rows_a_group: int = 3, name: str = "text") -> Path:
    table = pa.table({"id": list(range(len(texts))), name: texts})
    pq.write_table(table, path, row_group_size=rows_a_group)
    return path


def test_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfOne  two.\r\n\nB\xff\nN\0\n Last.")
    assert read("lines", path) == [
        Document("One two.", 14),
        Document("", 1, "empty"),
        Document("", 3, "damaged"),
        Document("", 3, "damaged"),
        Document("Last.", 6),
    ]


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        '{"text": "One\\n\\ntwo  three.", "id": 1}',
        '{"text": null}',
        '{"text": ""}',
        '{"id": 2}',
        '{"text": 3}',
        '{"text": "half \\ud800"}',
        '{"text": "nul \\u0000"}',
        "[1]",
        '{"text": "cut sho',
        "[" * 100_000,
        "",
        '{"text": "é"}',
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(lines).encode())
    found = read("json", path)
    assert [d.text for d in found if not d.dropped] == ["One\ntwo three.", "é"]
    assert [d.dropped for d in found] == ["", "empty", "empty", *["damaged"] * 7, "empty", ""]
    assert sum(d.num_bytes for d in found) == path.stat().st_size


@pytest.mark.parametrize("name", ["a.json", "a.ndjson", "a.JSONL", "a.json.gz", "a.jsonl.gz"])
def test_names_of_json_lines(tmp_path: Path, name: str) -> None:
    raw = b'{"body": "One."}\n{"body": "Two."}\n'
    path = write(tmp_path / name, gzip.compress(raw) if name.endswith("gz") else raw)
    assert read("json", tmp_path, column="body") == [Document("One.", 17), Document("Two.", 17)]
    assert read("json", path, column="body") == read("json", tmp_path, column="body")


def test_key_missing_in_all_first_rows_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b'{"text": "x"}\n')
    write(tmp_path / "b.jsonl", b'\n{"id": 1, "content": "x"}\n' * 100)
    with pytest.raises(MsltError, match=r"b\.jsonl: no key 'text' .*\['id', 'content'\]"):
        read("json", tmp_path)
    write(tmp_path / "b.jsonl", b'{"id": 1, "content": "x"}\n' * 19 + b'{"text": "x"}\n')
    assert [d.dropped for d in read("json", tmp_path)] == ["", *["damaged"] * 19, ""]


@pytest.mark.parametrize("raw", [b'[\n {"text": "x"}\n]', b'[{"text": "x"}]', b"plain text", b"\xff\xfe{"])
def test_what_is_no_json_lines_is_named(tmp_path: Path, raw: bytes) -> None:
    if raw.startswith(b"[\n"):
        raw = b"[\n" + json.dumps([1], indent=1).encode() + b"\n]"
    with pytest.raises(MsltError, match=r"a\.json: no JSON object .*one object a line"):
        read("json", write(tmp_path / "a.json", raw))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_empty_files_are_counted(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, gzip.compress(b"") if name.endswith("gz") else b"")
    kind = "json" if "json" in name else "lines"
    assert read(kind, tmp_path) == [Document("", 0, "empty")]


def test_damaged_gz_is_named(tmp_path: Path) -> None:
    packed = gzip.compress("".join(f"Line {n}.\n" for n in range(10_000)).encode())
    for raw in (packed[:-100], b"no gzip", packed[:1000] + b"\xff" * 99 + packed[1099:]):
        with pytest.raises(MsltError, match=r"a\.txt\.gz: damaged or cut short.*fetch it again"):
            read("lines", write(tmp_path / "a.txt.gz", raw))


@pytest.mark.parametrize("packed", [False, True])
def test_oversized_line_is_skipped_in_little_memory(tmp_path: Path, packed: bool) -> None:
    raw = b"First.\n" + b"x" * (3 * MAX_DOCUMENT_BYTES) + b"\nLast.\n"
    path = write(tmp_path / "a.txt.gz", gzip.compress(raw, 1)) if packed else write(tmp_path / "a.txt", raw)
    tracemalloc.start()
    found = read("lines", path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(d.text, d.dropped) for d in found] == [("First.", ""), ("", "oversized"), ("Last.", "")]
    assert sum(d.num_bytes for d in found) == len(raw)
    assert peak < 2 * MAX_DOCUMENT_BYTES


CUT_LINES = st.sampled_from(
    [b"a\n", b"\n", b"word word\n", b'{"text": "x y"}\n', b"\xff\0\n", b"z" * 50 + b"\n", b"end"]
)


@pytest.mark.parametrize("kind", ["lines", "json"])
@settings(derandomize=True, deadline=None)
@given(raw=st.lists(CUT_LINES, max_size=20).map(b"".join))
def test_rows_are_the_same_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, kind: str, raw: bytes
) -> None:
    raw = b'{"text": "first"}\n' + raw
    path = write(tmp_path_factory.getbasetemp() / f"cut.{'txt' if kind == 'lines' else 'jsonl'}", raw)
    whole = read(kind, path)
    assert sum(document.num_bytes for document in whole) == len(raw)
    assert len(whole) == len(raw.removesuffix(b"\n").split(b"\n"))
    for size in (1, 2, 7, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "PART_BYTES", size)
            assert read(kind, path) == whole


@settings(derandomize=True, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert sum(d.num_bytes for d in read("lines", write(folder / "any.txt", raw))) == len(raw)
    raw = b'{"text": "x"}\n' + raw
    assert sum(d.num_bytes for d in read("json", write(folder / "any.jsonl", raw))) == len(raw)
    for kind, name in (("parquet", "any.parquet"), ("lines", "any.txt.gz")):
        with pytest.raises(MsltError, match=name):
            read(kind, write(folder / name, b"no" + raw))


@pytest.mark.parametrize("rows_a_group", [1, 3, 100])
def test_parquet(tmp_path: Path, rows_a_group: int) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["One\n\ntwo  three.", None, "", "é", "N\0", "Last."], rows_a_group)
    assert read("parquet", path) == [
        Document("One\ntwo three.", 16),
        Document("", 0, "empty"),
        Document("", 0, "empty"),
        Document("é", 2),
        Document("", 2, "damaged"),
        Document("Last.", 5),
    ]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_types_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    write_parquet(tmp_path / "a.parquet", pa.array(["One.", None, "One."]).cast(kind))
    assert [d.text for d in read("parquet", tmp_path)] == ["One.", "", "One."]


def test_parquet_row_that_is_not_utf8_takes_no_other_with_it(tmp_path: Path) -> None:
    offsets, data = pa.py_buffer(b"\0\0\0\0\3\0\0\0\5\0\0\0\x08\0\0\0"), pa.py_buffer(b"one\xff\xfetwo")
    write_parquet(tmp_path / "a.parquet", pa.Array.from_buffers(pa.string(), 3, [None, offsets, data]))
    assert [(d.text, d.num_bytes, d.dropped) for d in read("parquet", tmp_path)] == [
        ("one", 3, ""),
        ("", 2, "damaged"),
        ("two", 3, ""),
    ]


def test_parquet_oversized_and_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_DOCUMENT_BYTES", 9)
    write_parquet(tmp_path / "a.parquet", ["x" * 10, "x" * 9])
    write_parquet(tmp_path / "b.parquet", pa.array([], pa.string()))
    assert [(d.num_bytes, d.dropped) for d in read("parquet", tmp_path)] == [
        (10, "oversized"),
        (9, ""),
        (0, "empty"),
    ]


def test_parquet_in_little_memory(tmp_path: Path) -> None:
    texts = pa.array([os.urandom(5000).hex() for _ in range(4000)])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="none", write_batch_size=16)
    del texts
    program = (
        "import sys, pyarrow\nfrom data_prep import rows\nfrom data_prep.recipe import FileSource\n"
        "source = FileSource(kind='parquet', path=sys.argv[1])\n(part,) = rows.list_parts(source)\n"
        "assert sum(d.num_bytes for d in rows.read_part(source, part)) == 40_000_000\n"
        "print(pyarrow.default_memory_pool().max_memory())"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert int(subprocess.run(command, check=True, capture_output=True).stdout) < 20_000_000


@pytest.mark.parametrize(("num_characters", "rows_a_batch"), [(5, 64), (2**20, 7), (9 * 2**20, 1)])
def test_parquet_rows_a_batch(tmp_path: Path, num_characters: int, rows_a_batch: int) -> None:
    texts = [str(n) * num_characters for n in range(3)]
    group = pq.read_metadata(write_parquet(tmp_path / "a.parquet", texts)).row_group(0)
    assert rows.batch_rows(group, "text") == rows_a_batch
    assert [d.text for d in read("parquet", tmp_path)] == texts


def test_parquet_without_the_column_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["x"], name="body")
    with pytest.raises(MsltError, match=r"a\.parquet: no column 'text'; set the source's column .*'id', 'body'"):
        read("parquet", path)
    with pytest.raises(MsltError, match=r"column 'id' is of type int64"):
        read("parquet", path, column="id")


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    raw = write_parquet(tmp_path / "a.parquet", [f"Text {n} of many." for n in range(2000)], 500).read_bytes()
    footer = 8 + int.from_bytes(raw[-8:-4], "little")
    for broken in (raw[:-20], raw[:100], b"", b"x" * 100, b"\xff" * (len(raw) - footer) + raw[-footer:]):
        with pytest.raises(MsltError, match=r"a\.parquet: no Parquet file, or damaged.*fetch it again"):
            read("parquet", write(tmp_path / "a.parquet", broken))


def test_max_files(tmp_path: Path) -> None:
    for name in "cab":
        write(tmp_path / f"{name}.txt", b"x\n")
    source = FileSource(kind="lines", path=str(tmp_path), max_files=2)
    assert [part.name for part in rows.list_parts(source)] == ["a.txt", "b.txt"]
