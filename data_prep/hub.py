"""Datasets of the Hugging Face hub, or local folders that `datasets` reads: streamed, a document a row."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import datasets
import pyarrow as pa

from data_prep.documents import PART_BYTES, Document, Part
from data_prep.recipe import HubSource
from data_prep.text import LINE_END, make_document
from mslt.errors import MsltError

# What `datasets` raises: unreachable, missing, gated; a wrong config or split; a script; damaged files.
FAILURES = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, pa.ArrowException)
REMEDY = (
    "correct the source's dataset, config, split or column; for a gated dataset accept its terms on the hub and run"
    " `hf auth login`; without network name a local folder"
)


def list_parts(source: HubSource) -> list[Part]:
    """A part for each of the dataset's files, or one for all where `max_documents` counts over all of them."""
    stream = load(source)
    num_shards = stream.num_shards
    size_bytes = (stream.info.dataset_size or 0) // num_shards or PART_BYTES  # known only where the card says it
    step = num_shards if source.max_documents else 1
    name = Path(source.dataset).name if Path(source.dataset).is_dir() else source.dataset
    return [Part(name, None, start, start + step, size_bytes) for start in range(0, num_shards, step)]


def read_part(source: HubSource, part: Part) -> Iterator[Document]:
    """Keys are the shard and the row in it; in a part of all shards rows count on over them. Line ends part
    paragraphs. A null is an empty document."""
    stream = load(source)
    taken = source.max_documents
    stream = stream.take(taken) if taken else stream.shard(stream.num_shards, part.start)
    with failures_of(source):
        for index, row in enumerate(stream):
            text = row[source.column] or ""
            num_bytes = len(text.encode("utf-8", "surrogatepass"))
            yield make_document(f"{part.name}#{part.start}-{index}", text, num_bytes, LINE_END)


@lru_cache(maxsize=1)
def load(source: HubSource) -> datasets.IterableDataset:
    """The split with its text column alone. Kept for the parts that follow: finding a dataset's files takes seconds.
    MsltError if it cannot be opened, or has no such column of text."""
    with failures_of(source):
        stream = datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=True)
        if stream.features is None:
            stream = stream._resolve_features()
    kind = stream.features.get(source.column)
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        has = f"its column {source.column!r} holds no text" if kind else f"no column {source.column!r}"
        columns = ", ".join(stream.features)
        raise MsltError(f"{source.dataset}: {has}; set the source's column to one that does, of {columns}")
    return stream.select_columns([source.column])


@contextmanager
def failures_of(source: HubSource) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        what = "/".join(filter(None, [source.dataset, source.config, source.split]))
        raise MsltError(f"{what}: {' '.join(str(error).split())[:400]}; {REMEDY}") from error
