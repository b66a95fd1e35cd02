"""From a piece of a source to a file of clean documents, each with what finding duplicates needs."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.duplicates import NUM_BANDS, NUM_PERMUTATIONS, hash_text, sketch
from data_prep.sentences import split_sentences
from data_prep.sources import Piece, read_piece
from mslt.data.manifest import Amount
from mslt.files import whole_file

# Text held in memory by one process, and the size of a row group of the file.
BATCH_BYTES = 8 * 2**20
# Control and format characters (zero-width spaces, soft hyphens, direction marks), private use and surrogates; of
# them only the joiners of Indic and Persian spelling stay.
JOINERS = "\u200c\u200d"
NOT_TEXT = ("Cc", "Cf", "Co", "Cs")
SCHEMA = pa.schema(
    [
        ("text", pa.large_string()),  # sentences, one a line
        ("num_bytes", pa.int64()),  # as found
        ("hash", pa.uint64()),
        ("bands", pa.binary(NUM_BANDS * 8)),
        ("signature", pa.binary(NUM_PERMUTATIONS)),
    ]
)


def clean_piece(piece: Piece, path: Path, with_sketches: bool) -> None:
    """Write the clean documents of a piece to `path`, whole; what each rule dropped is in the file's metadata."""
    dropped: dict[str, Amount] = defaultdict(Amount)
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as file:
        for rows in batches(clean_documents(piece, dropped)):
            file.write_table(make_table(rows, with_sketches), row_group_size=len(rows))
        file.add_key_value_metadata({rule: amount.model_dump_json() for rule, amount in dropped.items()})


def clean_documents(piece: Piece, dropped: dict[str, Amount]) -> Iterator[tuple[str, int]]:
    """(sentences one a line, bytes as found) of every document with text; the others are counted in `dropped`."""
    for document in read_piece(piece):
        rule = document.dropped
        sentences = [] if rule else split_sentences(normalise(document.text))
        if sentences:
            yield "\n".join(sentences), document.num_bytes
        else:
            dropped[rule or "empty"] += Amount(documents=1, bytes=document.num_bytes)


def normalise(text: str) -> str:
    """Nothing in it that is neither text nor white space, and of that Unicode's canonical composition (NFC)."""
    if text.isascii() and text.isprintable():
        return text
    bad = {c for c in set(text) if unicodedata.category(c) in NOT_TEXT and not c.isspace() and c not in JOINERS}
    return unicodedata.normalize("NFC", text.translate(dict.fromkeys(map(ord, bad))) if bad else text)


def batches(documents: Iterable[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    held: list[tuple[str, int]] = []
    held_bytes = 0
    for document in documents:
        held.append(document)
        held_bytes += len(document[0])
        if held_bytes >= BATCH_BYTES:
            yield held
            held, held_bytes = [], 0
    if held:
        yield held


def make_table(rows: list[tuple[str, int]], with_sketches: bool) -> pa.Table:
    texts, num_bytes = zip(*rows, strict=True)
    hashes = pa.array(map(hash_text, texts), pa.uint64())
    sketches = sketch(list(texts)) if with_sketches else (None, None)
    bands, signatures = (
        binary_column(rows_of_bytes, SCHEMA.field(name).type, len(rows))
        for rows_of_bytes, name in zip(sketches, ("bands", "signature"), strict=True)
    )
    columns = [pa.array(texts, pa.large_string()), pa.array(num_bytes, pa.int64()), hashes, bands, signatures]
    return pa.table(columns, schema=SCHEMA)


def binary_column(rows: np.ndarray | None, kind: pa.DataType, num_rows: int) -> pa.Array:
    if rows is None:
        return pa.nulls(num_rows, kind)
    return pa.Array.from_buffers(kind, num_rows, [None, pa.py_buffer(np.ascontiguousarray(rows))])


def count_documents(paths: list[Path]) -> list[int]:
    return [pq.read_metadata(path).num_rows for path in paths]


def read_column(paths: list[Path], name: str, dtype: str, wanted: np.ndarray | None = None) -> np.ndarray:
    """A column of fixed width of all files as one array, [documents, width]; of the `wanted` documents (bool) alone."""
    width = SCHEMA.field(name).type.bit_width // 8 // np.dtype(dtype).itemsize
    wanted = np.ones(sum(count_documents(paths)), bool) if wanted is None else wanted
    out = np.empty((int(wanted.sum()), width), dtype)
    start = filled = 0
    for path in paths:
        for chunk in pq.read_table(path, columns=[name])[name].chunks:
            values = np.frombuffer(chunk.buffers()[1], dtype).reshape(-1, width)[chunk.offset :][: len(chunk)]
            values = values[wanted[start : start + len(chunk)]]
            out[filled : filled + len(values)] = values
            start, filled = start + len(chunk), filled + len(values)
    return out


def text_bytes(path: Path) -> int:
    """How much text a file of clean documents holds, uncompressed."""
    metadata = pq.read_metadata(path)
    column = SCHEMA.get_field_index("text")
    return sum(metadata.row_group(i).column(column).total_uncompressed_size for i in range(metadata.num_row_groups))


def read_dropped(path: Path) -> dict[str, Amount]:
    metadata = pq.read_metadata(path).metadata or {}
    return {
        rule.decode(): Amount.model_validate_json(amount)
        for rule, amount in metadata.items()
        if rule != b"ARROW:schema"
    }
