"""The readers by kind, and the pieces of work that a recipe's sources fall into."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mslt
from data_prep.documents import Document, Part
from data_prep.recipe import FileSource, HubSource, Source
from mslt.files import canonical_json, sha256_text

# By name: a reader is loaded when a source needs it (`datasets` alone takes more than a second in every process).
READERS = {
    "text": "data_prep.text",
    "lines": "data_prep.rows",
    "json": "data_prep.rows",
    "parquet": "data_prep.rows",
    "wikipedia": "data_prep.wikipedia",
    "books": "data_prep.books",
    "python_docs": "data_prep.python_docs",
    "hub": "data_prep.hub",
}
# One process reads and cleans a piece at a time, and one shard comes of it. Small enough that a killed run loses
# little, large enough that English Wikipedia is some thousand shards. Not by the number of cores: shards depend on it.
PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Piece:
    """Parts of one source that are read one after the other. `index` counts over all sources."""

    index: int
    source_index: int
    source: Source
    parts: tuple[Part, ...]

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def key(self) -> str:
        """Names what reading it gives: another file, size, time of change or version of mslt makes another key."""
        files = [
            [part.name, str(part.path), part.path.stat().st_mtime_ns if part.path else 0, *part[2:]]
            for part in self.parts
        ]
        return sha256_text(canonical_json([mslt.__version__, self.source.model_dump(mode="json"), files]))[:20]


def reader(source: Source) -> Any:
    return import_module(READERS[source.kind])


def list_pieces(sources: tuple[Source, ...], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """All parts of all sources in the order they are read, put together until they reach `piece_bytes`."""
    pieces: list[Piece] = []
    for source_index, source in enumerate(sources):
        held: list[Part] = []
        held_bytes = 0
        for part in reader(source).list_parts(source):
            if held and held_bytes + part.size_bytes > piece_bytes:
                pieces.append(Piece(len(pieces), source_index, source, tuple(held)))
                held, held_bytes = [], 0
            held.append(part)
            held_bytes += part.size_bytes
        pieces.append(Piece(len(pieces), source_index, source, tuple(held)))
    return pieces


def read_piece(piece: Piece) -> Iterator[Document]:
    for part in piece.parts:
        yield from reader(piece.source).read_part(piece.source, part)


def source_name(source: Source) -> str:
    """What the manifest calls it."""
    match source:
        case FileSource():
            return source.path or ""
        case HubSource():
            return "/".join(filter(None, [source.dataset, source.config, source.split]))
