"""Token shards: Arrow files that hold documents as sentences of token ids, without special tokens.

    folder/manifest.json  tokenizer/  train-00000.arrow …  validation-00000.arrow …

One row is a document: `tokens`, all its sentences concatenated, and `sentence_lengths`. Nothing in a shard
depends on sequence length, sentence pairs or masks, so one shard folder serves every stage and every epoch.
"""

from bisect import bisect_right
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from mslt.data.manifest import (
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    Manifest,
    ShardEntry,
    SplitEntry,
    read_manifest,
)
from mslt.errors import MsltError
from mslt.files import sha256_file

SHARD_TOKENS = 64 * 2**20
# A batch is what the writer holds in memory; a document is never cut, so a longer one makes a longer batch.
BATCH_TOKENS = 2**20


class SpecialIds(NamedTuple):
    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def special_ids(tokenizer: Tokenizer, name: str) -> SpecialIds:
    """Ids of BERT's five special tokens; MsltError, naming `name` and the missing ones, if not all are there."""
    ids = {f"[{field.upper()}]": tokenizer.token_to_id(f"[{field.upper()}]") for field in SpecialIds._fields}
    missing = [token for token, index in ids.items() if index is None]
    if missing:
        raise MsltError(f"{name}: the vocabulary lacks {', '.join(missing)}; a BERT vocabulary needs {' '.join(ids)}")
    return SpecialIds(*(index for index in ids.values() if index is not None))


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 2**16 - 1 else np.uint32)


def shard_schema(vocab_size: int) -> pa.Schema:
    return pa.schema(
        [
            ("tokens", pa.large_list(pa.from_numpy_dtype(token_dtype(vocab_size)))),
            ("sentence_lengths", pa.large_list(pa.uint32())),
        ]
    )


class ShardWriter:
    """Writes one split as a stream: `add` each document, leave the context, read `entry`.

    A new shard begins when the last one holds `shard_tokens`. Memory is bounded by one batch.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        vocab_size: int,
        shard_tokens: int = SHARD_TOKENS,
        batch_tokens: int = BATCH_TOKENS,
    ):
        self.folder = folder
        self.split = split
        self.schema = shard_schema(vocab_size)
        self.dtype = token_dtype(vocab_size)
        self.shard_tokens = shard_tokens
        self.batch_tokens = batch_tokens
        self.token_counts = np.zeros(vocab_size, np.int64)
        self.shards: list[ShardEntry] = []
        self.file: pa.ipc.RecordBatchFileWriter | None = None
        self.path = folder
        self.written_documents = self.written_sentences = self.written_tokens = 0
        self.batch: list[tuple[np.ndarray, np.ndarray]] = []
        self.held_tokens = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close_shard()
        elif self.file is not None:
            self.file.close()

    def add(self, sentences: list[list[int]]) -> None:
        """Add a document of one or more sentences, none of them empty."""
        lengths = np.array([len(sentence) for sentence in sentences], np.uint32)
        assert len(lengths) > 0, "a document holds sentences"
        assert lengths.all(), "a sentence holds tokens"
        tokens = np.array([token for sentence in sentences for token in sentence], self.dtype)
        self.token_counts += np.bincount(tokens, minlength=len(self.token_counts))
        self.batch.append((tokens, lengths))
        self.held_tokens += len(tokens)
        if self.written_tokens + self.held_tokens >= self.shard_tokens:
            self.close_shard()
        elif self.held_tokens >= self.batch_tokens:
            self.write_batch()

    def write_batch(self) -> None:
        if not self.batch:
            return
        if self.file is None:
            self.path = self.folder / f"{self.split}-{len(self.shards):05d}.arrow"
            self.file = pa.ipc.new_file(str(self.path), self.schema)
        tokens, lengths = zip(*self.batch, strict=True)
        columns = [large_list_array(tokens), large_list_array(lengths)]
        self.file.write_batch(pa.record_batch(columns, schema=self.schema))
        self.written_documents += len(tokens)
        self.written_sentences += sum(map(len, lengths))
        self.written_tokens += self.held_tokens
        self.batch, self.held_tokens = [], 0

    def close_shard(self) -> None:
        self.write_batch()
        if self.file is None:
            return
        self.file.close()
        self.shards.append(
            ShardEntry(
                file=self.path.name,
                documents=self.written_documents,
                sentences=self.written_sentences,
                tokens=self.written_tokens,
                bytes=self.path.stat().st_size,
                sha256=sha256_file(self.path),
            )
        )
        self.file = None
        self.written_documents = self.written_sentences = self.written_tokens = 0

    @property
    def entry(self) -> SplitEntry:
        return SplitEntry(
            documents=sum(shard.documents for shard in self.shards),
            sentences=sum(shard.sentences for shard in self.shards),
            tokens=sum(shard.tokens for shard in self.shards),
            shards=tuple(self.shards),
        )


def large_list_array(rows: tuple[np.ndarray, ...]) -> pa.LargeListArray:
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))


class ShardArrays(NamedTuple):
    """One shard as flat arrays; `tokens` are read-only views of the mapped file, one for each record batch."""

    tokens: list[np.ndarray]
    sentence_lengths: np.ndarray
    document_sentences: np.ndarray
    document_tokens: np.ndarray


def map_shard(path: Path) -> ShardArrays:
    """Map a shard into memory; MsltError if Arrow cannot read it."""
    tokens, lengths, document_sentences, document_tokens = [], [], [], []
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            batch.validate()
            tokens.append(batch["tokens"].flatten().to_numpy(zero_copy_only=True))
            lengths.append(batch["sentence_lengths"].flatten().to_numpy(zero_copy_only=True))
            document_tokens.append(batch["tokens"].value_lengths().to_numpy())
            document_sentences.append(batch["sentence_lengths"].value_lengths().to_numpy())
    except (pa.ArrowException, KeyError) as error:
        raise MsltError(f"{path}: not a readable shard ({error}); restore it or prepare the shards anew") from error
    return ShardArrays(
        tokens,
        np.concatenate([np.empty(0, np.uint32), *lengths]),
        np.concatenate([np.empty(0, np.int64), *document_sentences]),
        np.concatenate([np.empty(0, np.int64), *document_tokens]),
    )


class Shards:
    """One split of a shard folder. Sentences and documents are numbered on over all its shards.

    Tokens stay in the mapped files; the index in memory costs 12 bytes a sentence and 8 a document.
    """

    manifest: Manifest
    sentence_lengths: np.ndarray  # uint32 [num_sentences]
    document_starts: np.ndarray  # int64 [num_documents + 1], index of each document's first sentence
    token_starts: np.ndarray  # int64 [num_sentences + 1], position of each sentence's first token

    def __init__(self, folder: Path, split: str):
        self.folder = folder
        self.split = split
        self.manifest = read_manifest(folder)
        if split not in self.manifest.splits or not self.manifest.splits[split].documents:
            raise MsltError(
                f"{folder}: the {split} split is empty; prepare the shards with a validation_share above 0 "
                f"and enough documents (splits: {', '.join(self.manifest.splits)})"
            )
        entries = self.manifest.splits[split].shards
        shards = [map_checked_shard(folder, entry) for entry in entries]
        self.sentence_lengths = np.concatenate([shard.sentence_lengths for shard in shards])
        self.document_starts = cumulative(np.concatenate([shard.document_sentences for shard in shards]))
        self.token_starts = cumulative(self.sentence_lengths)
        self._blocks = [block for shard in shards for block in shard.tokens]
        self._block_starts: list[int] = cumulative(np.array([len(b) for b in self._blocks])).tolist()[:-1]

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def num_sentences(self) -> int:
        return len(self.sentence_lengths)

    @property
    def vocab_size(self) -> int:
        return self.manifest.tokenizer.vocab_size

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / TOKENIZER_FOLDER

    @cached_property
    def special_ids(self) -> SpecialIds:
        path = self.tokenizer_folder / TOKENIZER_FILE
        return special_ids(Tokenizer.from_file(str(path)), str(path))

    def tokens(self, first_sentence: int, last_sentence: int) -> np.ndarray:
        """Token ids of sentences first..last-1, all of one document: a read-only view of uint16 or uint32."""
        start, end = int(self.token_starts[first_sentence]), int(self.token_starts[last_sentence])
        block = bisect_right(self._block_starts, start) - 1
        offset = self._block_starts[block]
        return self._blocks[block][start - offset : end - offset]

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapped file does not pickle: a spawned worker opens the folder again.
        return open_shards, (self.folder, self.split)


def open_shards(folder: Path | str, split: str) -> Shards:
    """Open one split ("train" or "validation") of a shard folder; MsltError if anything does not fit its manifest."""
    return Shards(Path(folder), split)


def map_checked_shard(folder: Path, entry: ShardEntry) -> ShardArrays:
    """Map a shard and compare its counts with the manifest's."""
    path = folder / entry.file
    shard = map_shard(path)
    found = {
        "documents": len(shard.document_sentences),
        "sentences": len(shard.sentence_lengths),
        "tokens": sum(map(len, shard.tokens)),
    }
    for name, count in found.items():
        if count != getattr(entry, name):
            raise MsltError(
                f"{path}: {count} {name}, the manifest says {getattr(entry, name)}; "
                "restore the file or prepare the shards anew"
            )
    if int(shard.sentence_lengths.sum(dtype=np.int64)) != entry.tokens:
        raise MsltError(f"{path}: the sentence lengths do not add up to {entry.tokens} tokens; prepare the shards anew")
    return shard


def cumulative(lengths: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each of n pieces begins, and the end of the last."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts
