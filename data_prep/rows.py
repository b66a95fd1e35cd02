"""Files of rows, a document each: lines of text, JSON lines, Parquet. In a row's text, line ends part paragraphs."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.documents import Document, Part, find_files, list_files
from data_prep.recipe import FileSource
from data_prep.text import LINE_END, cut_file, decode, find_line, is_packed, make_document, open_file, read_lines
from mslt.errors import MsltError

NAMES = {
    "lines": (re.compile(r"(?i).+\.txt(\.gz)?"), ".txt, .txt.gz"),
    "json": (
        re.compile(r"(?i).+\.(jsonl|json|ndjson)(\.gz)?"),
        ".jsonl, .json, .ndjson, each also with .gz",
    ),
    "parquet": (re.compile(r"(?i).+\.parquet"), ".parquet"),
}
# Rows at a file's start that are looked at before anything is read: one of them must have the column.
ROWS_TRIED = 20
# Of Parquet: what is read at a time (without it, all of a row group's column: 219 MB of memory instead of 30 for one
# of 200 MB), and what is decoded together.
BUFFER_BYTES = 2**20
BATCH_BYTES = 8 * 2**20
MAX_BATCH_ROWS = 64


def list_parts(source: FileSource) -> list[Part]:
    """MsltError if a file has no such column, or is no Parquet."""
    root = Path(source.path or ".").expanduser()
    pattern, meaning = NAMES[source.kind]
    files = find_files(root, pattern, meaning)[: source.max_files]
    if source.kind == "parquet":
        return [part for whole in list_files(root, files) for part in list_row_groups(whole, source.column)]
    if source.kind == "json":
        for path in files:
            check_json(path, source.column)
    return list_files(root, files, lambda path: [(0, path.stat().st_size)] if is_packed(path) else cut_file(path))


def read_part(source: FileSource, part: Part) -> Iterator[Document]:
    """A row that is not UTF-8, is no JSON object, or lacks the column or text in it is damaged; a null is empty."""
    assert part.path is not None
    if source.kind == "parquet":
        yield from read_row_group(part, part.path, source.column)
        return
    # A packed file is one part, and its lines are counted by the bytes they unpack to.
    end = None if is_packed(part.path) else part.end
    with open_file(part.path) as file:
        line = None
        for line in read_lines(file, find_line(file, part.start, part.end), end):
            text = None if line.raw is None else decode(line.raw)
            if text is not None and source.kind == "json":
                text = read_json(text, source.column)
            yield make_document(text, line.num_bytes, LINE_END)
        if line is None and part.start == 0:
            yield Document("", 0, "empty")


def read_json(line: str, column: str) -> str | None:
    """The text in a row; None where there is none. A blank line or a null is an empty text."""
    row = parse_json(line) if line.strip() else {column: None}
    value = row.get(column, False) if isinstance(row, dict) else False
    return "" if value is None else value if isinstance(value, str) else None


def parse_json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def check_json(path: Path, column: str) -> None:
    """MsltError if there are rows at the file's start, and none of them has the column."""
    seen: list[Any] = []
    with open_file(path) as file:
        for line in read_lines(file, 0):
            text = decode(line.raw) if line.raw is not None else None
            if text is None or text.strip():
                seen.append(parse_json(text or ""))
            if isinstance(seen and seen[-1], dict) and column in seen[-1]:
                return
            if len(seen) == ROWS_TRIED:
                break
    keys = {key: None for row in seen if isinstance(row, dict) for key in row}
    if keys:
        raise MsltError(f"{path}: no key {column!r} in its first rows; set the source's column to one of {list(keys)}")
    if seen:
        raise MsltError(
            f"{path}: no JSON object on any of its first lines; this kind reads JSON lines, one object a line"
            " (jq -c '.[]' makes them of a JSON array)"
        )


def list_row_groups(whole: Part, column: str) -> Iterator[Part]:
    """A part for each row group, counted by its text once unpacked; a file without rows is one part without any."""
    assert whole.path is not None
    with open_parquet(whole.path) as file:
        names = file.schema_arrow.names
        kind = file.schema_arrow.field(column).type if column in names else None
        if not is_text(kind):
            has = f"column {column!r} is of type {kind}" if kind else f"no column {column!r}"
            raise MsltError(f"{whole.path}: {has}; set the source's column to one that holds text, of {names}")
        if not file.metadata.num_rows:
            yield whole._replace(end=0)
            return
        for index in range(file.num_row_groups):
            yield Part(whole.name, whole.path, index, index + 1, text_bytes(file.metadata.row_group(index), column))


def is_text(kind: pa.DataType | None) -> bool:
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def text_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    chunks = (group.column(index) for index in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def read_row_group(part: Part, path: Path, column: str) -> Iterator[Document]:
    if part.end == part.start:
        yield Document("", 0, "empty")
        return
    with open_parquet(path) as file:
        num_rows = batch_rows(file.metadata.row_group(part.start), column)
        batches = file.iter_batches(num_rows, row_groups=[part.start], columns=[column], use_threads=False)
        for batch in batches:
            for raw in as_bytes(batch.column(0)).to_pylist():
                yield make_document(decode(raw or b""), len(raw or b""), LINE_END)


def batch_rows(group: pq.RowGroupMetaData, column: str) -> int:
    """As many rows of mean size as BATCH_BYTES hold. Not more than MAX_BATCH_ROWS: a text that comes again and again
    may be in the file, and count, only once."""
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * group.num_rows // max(text_bytes(group, column), 1)))


def as_bytes(texts: pa.Array) -> pa.Array:
    """Bytes, so that a row which is not UTF-8 takes no other with it."""
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    return texts.cast(pa.binary_view() if texts.type == pa.string_view() else pa.large_binary())


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        what = " ".join(str(error).split())
        raise MsltError(
            f"{path}: no Parquet file, or damaged or cut short ({what}); fetch it again, or take it out of the source"
        ) from None
