"""From a file of clean documents to a shard for each split."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from data_prep.duplicates import RULES
from data_prep.vocabulary import encode_sentences
from mslt.data.manifest import SPLITS, TOKENIZER_FILE, TOKENIZER_FOLDER, Amount
from mslt.data.shards import shard_entry, write_shard
from mslt.files import write_json

# Sentences are encoded together up to this much text: what the tokenizer gives for a token takes some 100 bytes.
ENCODED_CHARACTERS = 2**20


def choose_split(hashes: np.ndarray, validation_share: float) -> np.ndarray:
    """bool: held out. By the text's own hash (uint64): a document keeps its split when sources are added."""
    return hashes / 2.0**64 < validation_share


def tokenize_piece(
    documents: Path,
    duplicates: np.ndarray,
    folder: Path,
    name: str,
    marker: Path,
    validation_share: float,
    min_document_tokens: int,
) -> None:
    """Write the shards `train-NAME.arrow` and `validation-NAME.arrow` in `folder`, then `marker`, with what is in them.

    `duplicates` says for each document whether one of `RULES` took it; documents too short are dropped here."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FOLDER / TOKENIZER_FILE))
    amounts: dict[str, Amount] = defaultdict(Amount)
    paths = {split: folder / f"{split}-{name}.arrow" for split in SPLITS}
    with ExitStack() as stack:
        train, validation = (
            stack.enter_context(write_shard(paths[split], tokenizer.get_vocab_size())) for split in SPLITS
        )
        for rows, rules in zip_rules(documents, duplicates):
            for index, rule in enumerate(rules.tolist()):
                if rule:
                    amounts[RULES[rule]] += Amount(documents=1, bytes=rows["num_bytes"][index])
            texts = [text for text, rule in zip(rows["text"], rules, strict=True) if not rule]
            hashes = np.array(rows["hash"], np.uint64)[rules == 0]
            sizes = np.array(rows["num_bytes"])[rules == 0].tolist()
            is_validation = choose_split(hashes, validation_share).tolist()
            for held_out, num_bytes, sentences in zip(is_validation, sizes, encode(tokenizer, texts), strict=True):
                is_short = sum(map(len, sentences)) < min_document_tokens
                rule = "short" if is_short else "kept"
                amounts[rule] += Amount(documents=1, bytes=num_bytes)
                if not is_short:
                    (validation if held_out else train).add(sentences)
    entries = {
        split: shard_entry(paths[split], writer).model_dump(mode="json")
        for split, writer in (("train", train), ("validation", validation))
        if writer.num_documents
    }
    for split in set(SPLITS) - set(entries):
        paths[split].unlink()
    write_json(marker, {"amounts": {rule: a.model_dump() for rule, a in amounts.items()}, "shards": entries})


def zip_rules(documents: Path, rules: np.ndarray) -> Iterator[tuple[dict[str, list[Any]], np.ndarray]]:
    start = 0
    with pq.ParquetFile(documents) as file:
        for batch in file.iter_batches(columns=["text", "num_bytes", "hash"]):
            yield batch.to_pydict(), rules[start : start + len(batch)]
            start += len(batch)


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[list[int]]]:
    """The token ids of every sentence of each text; a sentence that leaves no token is left out."""
    held: list[list[str]] = []
    held_characters = 0
    for text in texts:
        held.append(text.split("\n"))
        held_characters += len(text)
        if held_characters >= ENCODED_CHARACTERS:
            yield from encode_together(tokenizer, held)
            held, held_characters = [], 0
    yield from encode_together(tokenizer, held)


def encode_together(tokenizer: Tokenizer, documents: list[list[str]]) -> Iterator[list[list[int]]]:
    encoded = encode_sentences(tokenizer, [sentence for document in documents for sentence in document])
    for document in documents:
        yield list(filter(None, islice(encoded, len(document))))
