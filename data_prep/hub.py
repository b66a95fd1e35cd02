"""Datasets of the Hugging Face hub, or local folders that `datasets` reads: streamed, a document a row."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, XetDownloadError
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # kept for others, whatever its own name

from data_prep.documents import PART_BYTES, Document, Part, walk_files
from data_prep.recipe import HubSource
from data_prep.text import LINE_END, make_document
from mslt.errors import MsltError
from mslt.files import canonical_json, sha256_text

# What `datasets` raises: unreachable, missing, gated; a wrong config or split; a script; a connection lost; damaged
# files (EOFError, zlib.error), an empty one (StopIteration), one whose column is of another type (TypeError).
FAILURES = (
    *(OSError, ValueError, RuntimeError, EOFError, StopIteration, TypeError),
    *(datasets.exceptions.DatasetsError, pa.ArrowException, zlib.error, httpx.HTTPError, XetDownloadError),
)
REMEDY = (
    "correct the source's dataset, config, revision, split or column; for a gated dataset accept its terms on the hub"
    " and run `hf auth login`; without network name a local folder"
)
INFO_TIMEOUT_S = 100.0  # as `datasets` waits


def list_parts(source: HubSource) -> list[Part]:
    """A part for each of the dataset's files, or one for all where `max_documents` counts over all of them. Its name
    is `dataset@version`."""
    version = find_version(source)
    stream = load(source, version)
    num_shards = stream.num_shards
    size_bytes = (stream.info.dataset_size or 0) // num_shards or PART_BYTES  # known only where the card says it
    step = num_shards if source.max_documents else 1
    name = f"{Path(source.dataset).resolve().name if is_local(source) else source.dataset}@{version}"
    return [Part(name, None, start, start + step, size_bytes) for start in range(0, num_shards, step)]


def read_part(source: HubSource, part: Part) -> Iterator[Document]:
    """Line ends part paragraphs. A null is an empty document, and what is no text a damaged one."""
    stream = load(source, part.name.rpartition("@")[2])
    taken = source.max_documents
    stream = stream.take(taken) if taken else stream.shard(stream.num_shards, part.start)
    with failures_of(source):
        for row in stream:
            value = row[source.column]
            text = "" if value is None else value if isinstance(value, str) else None
            yield make_document(text, len((text or "").encode("utf-8", "surrogatepass")), LINE_END)


def is_local(source: HubSource) -> bool:
    return Path(source.dataset).is_dir()


def find_version(source: HubSource) -> str:
    """What is to be read, so that other text never passes for it: the hub's commit, or of a local folder a hash over
    the names, sizes and times of change of its files."""
    if is_local(source):
        if source.revision is not None:
            raise MsltError(f"{source.dataset}: a local folder has no revision; leave the source's revision out")
        root = Path(source.dataset)
        files = [(path, path.stat()) for path in walk_files(root) if path.is_file()]
        named = [[path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns] for path, stat in files]
        return sha256_text(canonical_json(named))[:12]
    with failures_of(source):
        try:
            commit = HfApi().dataset_info(source.dataset, revision=source.revision, timeout=INFO_TIMEOUT_S).sha
        except HFValidationError:
            raise ValueError("no such folder, and no name of a dataset on the hub") from None
        if commit is None:
            raise ValueError("the hub names no commit of it")
        return commit


@lru_cache(maxsize=1)
def load(source: HubSource, version: str) -> datasets.IterableDataset:
    """The split with its text column alone. Kept for the parts that follow: finding a dataset's files takes seconds.
    MsltError if it cannot be opened, or has no such column of text."""
    revision = None if is_local(source) else version
    with failures_of(source):
        stream = datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=revision, streaming=True
        )
        columns = column_types(stream)
    if not columns:
        raise MsltError(f"{source.dataset}: holds no rows; take it out of the sources")
    if columns.get(source.column) not in ("string", "large_string"):
        known = source.column in columns
        has = f"its column {source.column!r} holds no text" if known else f"no column {source.column!r}"
        names = ", ".join(columns)
        raise MsltError(f"{source.dataset}: {has}; set the source's column to one that does, of {names}")
    return stream.select_columns([source.column])


def column_types(stream: datasets.IterableDataset) -> dict[str, str | None]:
    """By the columns' names; of files that do not say them, as their first row has them."""
    if stream.features is not None:
        return {name: getattr(kind, "dtype", None) for name, kind in stream.features.items()}
    row: dict[str, Any] = next(iter(stream.take(1)), {})
    return {name: "string" if isinstance(value, str | None) else None for name, value in row.items()}


@contextmanager
def failures_of(source: HubSource) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        what = "/".join(filter(None, [source.dataset, source.config, source.split]))
        said = " ".join(str(error).split())[:400] or type(error).__name__
        raise MsltError(f"{what}: {said}; {REMEDY}") from error
