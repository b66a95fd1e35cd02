"""Check every byte of a shard folder against its manifest, and show what is in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mslt.data.manifest import TOKENIZER_FILE, TOKENIZER_FOLDER, read_manifest
from mslt.data.shards import map_checked_shard, open_shards, token_dtype
from mslt.errors import MsltError
from mslt.files import sha256_file

NUM_EXAMPLES = 3
EXAMPLE_TOKENS = 60


def verify(folder: Path, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Checksums, counts, sentence lengths and token ids of all shards; a summary, or MsltError at the first fault.

    The summary's `examples` are the beginnings of some documents of each split, decoded back to text."""
    manifest = read_manifest(folder)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    remedy = "restore the file, or remove the folder and prepare the shards anew"
    total_bytes, done_bytes = sum(shard.bytes for shard in shards), 0
    vocab_size = manifest.tokenizer.vocab_size
    for name, sha256 in manifest.tokenizer.others.items():
        path = folder / TOKENIZER_FOLDER / name
        if not path.is_file() or sha256_file(path) != sha256:
            raise MsltError(f"{path}: missing or changed since the shards were made; {remedy}")
    for entry in shards:
        path = folder / entry.file
        found = sha256_file(path)
        if found != entry.sha256:
            raise MsltError(f"{path}: sha256 {found}, the manifest says {entry.sha256}; {remedy}")
        arrays = map_checked_shard(folder, entry)
        sums = np.add.reduceat(
            arrays.sentence_lengths.astype(np.int64),
            np.concatenate([[0], np.cumsum(arrays.document_sentences)[:-1]]),
        )
        if not arrays.document_sentences.all() or not np.array_equal(sums, arrays.document_tokens):
            raise MsltError(f"{path}: the sentences of a document do not add up to its tokens; {remedy}")
        if not arrays.sentence_lengths.all():
            raise MsltError(f"{path}: a sentence holds no token; {remedy}")
        for tokens in arrays.tokens:
            if tokens.dtype != token_dtype(vocab_size):
                raise MsltError(f"{path}: token ids are {tokens.dtype}, not {token_dtype(vocab_size)}; {remedy}")
            if len(tokens) and int(tokens.max()) >= vocab_size:
                raise MsltError(f"{path}: token id {int(tokens.max())}, the vocabulary has {vocab_size}; {remedy}")
        done_bytes += entry.bytes
        if progress:
            progress("verifying shards", done_bytes, total_bytes)
    for name, split in manifest.splits.items():
        for count in ("documents", "sentences", "tokens"):
            total = sum(getattr(shard, count) for shard in split.shards)
            if total != getattr(split, count):
                raise MsltError(
                    f"{folder}: splits.{name}.{count} is {getattr(split, count)} in the manifest, its shards "
                    f"hold {total}; {remedy}"
                )
    return {
        "folder": str(folder),
        "manifest_hash": manifest.hash,
        "shards": len(shards),
        "bytes": total_bytes,
        "vocab_size": vocab_size,
        **{
            name: {
                "documents": split.documents,
                "sentences": split.sentences,
                "tokens": split.tokens,
                "examples": examples(folder, name) if split.documents else [],
            }
            for name, split in manifest.splits.items()
        },
    }


def examples(folder: Path, split: str) -> list[str]:
    """The first tokens, as text, of documents spread evenly over a split."""
    shards = open_shards(folder, split)
    tokenizer = Tokenizer.from_file(str(shards.tokenizer_folder / TOKENIZER_FILE))
    chosen = np.linspace(0, shards.num_documents - 1, min(NUM_EXAMPLES, shards.num_documents)).astype(int)
    first_sentences = shards.document_starts[chosen]
    return [
        tokenizer.decode(shards.tokens(int(i), int(j)).tolist()[:EXAMPLE_TOKENS])
        for i, j in zip(first_sentences, shards.document_starts[chosen + 1], strict=True)
    ]
