"""Token shards: Arrow files that hold documents as sentences of token ids, without special tokens.

    folder/manifest.json  tokenizer/  train-00000.arrow …  validation-00000.arrow …

One row is a document: `tokens`, all its sentences concatenated, and `sentence_lengths`. Nothing in a shard
depends on sequence length, sentence pairs or masks, so one shard folder serves every stage and every epoch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from mslt.data.cache import Arrays, cached
from mslt.data.manifest import (
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    Manifest,
    ShardEntry,
    read_manifest,
)
from mslt.errors import MsltError
from mslt.files import sha256_file, whole_file

# A batch is what the writer holds in memory; a document is never cut, so a longer one makes a longer batch.
BATCH_TOKENS = 2**20
SMALL_SENTENCES = 2**20  # below, every index is built in memory, in well under a second


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
    """Writes one shard as a stream: `add` each document inside `write_shard`. Memory is bounded by one batch."""

    def __init__(self, file: pa.ipc.RecordBatchFileWriter, vocab_size: int) -> None:
        self.file = file
        self.vocab_size = vocab_size
        self.num_documents = self.num_sentences = self.num_tokens = 0
        self.batch: list[tuple[np.ndarray, np.ndarray]] = []
        self.held_tokens = 0

    def add(self, sentences: list[list[int]]) -> None:
        """Add a document of one or more sentences, none of them empty."""
        lengths = np.array([len(sentence) for sentence in sentences], np.uint32)
        assert len(lengths) > 0, "a document holds sentences"
        assert lengths.all(), "a sentence holds tokens"
        tokens = np.fromiter(chain.from_iterable(sentences), token_dtype(self.vocab_size), int(lengths.sum()))
        self.batch.append((tokens, lengths))
        self.held_tokens += len(tokens)
        if self.held_tokens >= BATCH_TOKENS:
            self.flush()

    def flush(self) -> None:
        if not self.batch:
            return
        tokens, lengths = zip(*self.batch, strict=True)
        columns = [large_list_array(tokens), large_list_array(lengths)]
        self.file.write_batch(pa.record_batch(columns, schema=shard_schema(self.vocab_size)))
        self.num_documents += len(tokens)
        self.num_sentences += sum(map(len, lengths))
        self.num_tokens += self.held_tokens
        self.batch, self.held_tokens = [], 0


@contextmanager
def write_shard(path: Path, vocab_size: int) -> Iterator[ShardWriter]:
    """A writer whose shard takes its name `path` when the context is left, whole, and not at all on failure."""
    with whole_file(path) as temporary, pa.ipc.new_file(str(temporary), shard_schema(vocab_size)) as file:
        writer = ShardWriter(file, vocab_size)
        yield writer
        writer.flush()


def shard_entry(path: Path, writer: ShardWriter) -> ShardEntry:
    return ShardEntry(
        file=path.name,
        documents=writer.num_documents,
        sentences=writer.num_sentences,
        tokens=writer.num_tokens,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
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

    Tokens stay in the mapped files. The index costs 8 bytes a sentence and 8 a document: in memory for a small split,
    else in a file of the cache that all processes of a machine map.
    """

    manifest: Manifest
    document_starts: np.ndarray  # int64 [num_documents + 1], index of each document's first sentence
    token_starts: np.ndarray  # int64 [num_sentences + 1], position of each sentence's first token
    token_blocks: list[np.ndarray]  # all tokens, in order: read-only views of uint16 or uint32, whole documents each

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
        self.token_blocks = [block for entry in entries for block in map_checked_shard(folder, entry).tokens]
        self._block_starts = cumulative(np.array([len(block) for block in self.token_blocks]))[:-1]
        starts = self.shared("sentences", {}, lambda: sentence_index(folder, entries))
        self.document_starts, self.token_starts = starts["documents"], starts["tokens"]

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def num_sentences(self) -> int:
        return self.manifest.splits[self.split].sentences

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

    @cached_property
    def is_continuation_V(self) -> np.ndarray:
        """bool [vocab_size]: which entries go on a word (`##…`)."""
        tokenizer = Tokenizer.from_file(str(self.tokenizer_folder / TOKENIZER_FILE))
        return np.array([(tokenizer.id_to_token(i) or "").startswith("##") for i in range(self.vocab_size)])

    def tokens(self, first_sentence: int, last_sentence: int) -> np.ndarray:
        """Token ids of sentences first..last-1, all of one document: a read-only view of uint16 or uint32."""
        start, end = self.token_starts[[first_sentence, last_sentence]]
        return self.token_runs(np.array([start]), np.array([end - start]))[0]

    def token_runs(self, first_token: np.ndarray, num_tokens: np.ndarray) -> list[np.ndarray]:
        """Runs of token ids, each inside one document: read-only views of uint16 or uint32."""
        block = np.searchsorted(self._block_starts, first_token, side="right") - 1
        start = first_token - self._block_starts[block]
        runs = zip(block.tolist(), start.tolist(), (start + num_tokens).tolist(), strict=True)
        return [self.token_blocks[block][start:end] for block, start, end in runs]

    def shared(
        self,
        name: str,
        key: dict[str, Any],
        make: Callable[[], Arrays],
        is_enough: Callable[[Arrays], bool] = lambda _: True,
        small_sentences: int = SMALL_SENTENCES,
    ) -> Arrays:
        """What `make` returns, kept in the cache under this corpus and split, see `cached`. A split below
        `small_sentences` makes it in every process that asks: that is quicker than it is worth a file."""
        if self.num_sentences < min(small_sentences, SMALL_SENTENCES):
            return make()
        return cached(self.manifest.hash, f"{self.split}-{name}", key, make, is_enough)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapped file does not pickle: a spawned worker opens the folder again.
        return open_shards, (self.folder, self.split)


def open_shards(folder: Path | str, split: str) -> Shards:
    """Open one split ("train" or "validation") of a shard folder; MsltError if anything does not fit its manifest."""
    return Shards(Path(folder), split)


def sentence_index(folder: Path, entries: tuple[ShardEntry, ...]) -> Arrays:
    """Where each document and each sentence of the shards begins, and the last ends."""
    shards = [map_checked_shard(folder, entry) for entry in entries]
    return {
        "documents": cumulative(np.concatenate([shard.document_sentences for shard in shards])),
        "tokens": cumulative(np.concatenate([shard.sentence_lengths for shard in shards])),
    }


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
