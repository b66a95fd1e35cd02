"""The manifest of a shard folder, from what every piece left behind."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_prep.cleaning import read_dropped
from data_prep.recipe import DataRecipe, Source
from data_prep.sources import Piece, source_name
from mslt.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    Amount,
    Manifest,
    Rules,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
)
from mslt.data.shards import map_shard
from mslt.errors import MsltError
from mslt.files import sha256_file
from mslt.provenance import provenance


def make_manifest(
    recipe: DataRecipe,
    recipe_sha256: str,
    pieces: list[Piece],
    documents: list[Path],
    shards: Path,
    markers: list[Path],
) -> Manifest:
    made = [json.loads(marker.read_text()) for marker in markers]
    amounts: list[dict[str, Amount]] = [defaultdict(Amount) for _ in recipe.sources]
    for piece, path, contents in zip(pieces, documents, made, strict=True):
        of_source = amounts[piece.source_index]
        for rule, amount in [*read_dropped(path).items(), *contents["amounts"].items()]:
            of_source[rule] += Amount.model_validate(amount)
    splits = {
        split: [ShardEntry(**contents["shards"][split]) for contents in made if split in contents["shards"]]
        for split in SPLITS
    }
    check_kept(recipe, amounts, splits)
    tokenizer_file = shards / TOKENIZER_FOLDER / TOKENIZER_FILE
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return Manifest(
        format_version=FORMAT_VERSION,
        recipe_sha256=recipe_sha256,
        sources=tuple(
            source_entry(source, [piece for piece in pieces if piece.source_index == index], amounts[index])
            for index, source in enumerate(recipe.sources)
        ),
        rules=Rules(
            validation_share=recipe.validation_share,
            min_document_tokens=recipe.min_document_tokens,
            exact_duplicates=recipe.duplicates.exact,
            near_duplicates=recipe.duplicates.near,
            near_duplicate_threshold=recipe.duplicates.threshold,
        ),
        tokenizer=TokenizerEntry(
            sha256=sha256_file(tokenizer_file),
            others={
                path.name: sha256_file(path)
                for path in sorted(tokenizer_file.parent.iterdir())
                if path.name != TOKENIZER_FILE
            },
            vocab_size=tokenizer.get_vocab_size(),
            lowercase=tokenizer.normalizer.lowercase,
        ),
        splits={
            split: SplitEntry(
                documents=sum(entry.documents for entry in entries),
                sentences=sum(entry.sentences for entry in entries),
                tokens=sum(entry.tokens for entry in entries),
                shards=tuple(entries),
            )
            for split, entries in splits.items()
        },
        unigram_entropy_nats=unigram_cross_entropy(
            *(count_tokens(shards, splits[split], tokenizer.get_vocab_size()) for split in SPLITS)
        ),
        provenance=provenance(),
    )


def source_entry(source: Source, pieces: list[Piece], amounts: dict[str, Amount]) -> SourceEntry:
    return SourceEntry(
        kind=source.kind,
        path=source_name(source),
        files=len({part.name for piece in pieces for part in piece.parts}),
        read=sum(amounts.values(), Amount()),
        kept=amounts["kept"],
        dropped={rule: amount for rule, amount in sorted(amounts.items()) if rule != "kept"},
    )


def check_kept(recipe: DataRecipe, amounts: list[dict[str, Amount]], splits: dict[str, list[ShardEntry]]) -> None:
    """MsltError where a split that is wanted came out empty."""
    kept = describe(amounts)
    if not splits["train"]:
        raise MsltError(f"sources: nothing is left for the train split ({kept}); add text or lower min_document_tokens")
    if recipe.validation_share and not splits["validation"]:
        raise MsltError(
            f"validation_share: no document among the {recipe.validation_share} held out ({kept}); raise it, add "
            "documents, or set it to 0 to hold out nothing"
        )


def describe(amounts: list[dict[str, Amount]]) -> str:
    """How many documents each rule took, over all sources or files."""
    counts: Counter[str] = Counter()
    for by_rule in amounts:
        counts.update({rule.replace("_", " "): amount.documents for rule, amount in by_rule.items()})
    found = ", ".join(f"{count:,} {rule}" for rule, count in sorted(counts.items()))
    return f"{counts.total():,} document{'s' * (counts.total() != 1)}: {found}" if found else "no documents"


def count_tokens(folder: Path, entries: list[ShardEntry], vocab_size: int) -> np.ndarray:
    """How often each token occurs, int64 [V]."""
    counts = np.zeros(vocab_size, np.int64)
    for entry in entries:
        for tokens in map_shard(folder / entry.file).tokens:
            counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def unigram_cross_entropy(train_counts: np.ndarray, validation_counts: np.ndarray) -> float | None:
    """Cross-entropy in nats of validation tokens under train's unigrams with add-one smoothing; int64 [V] each.
    None without validation tokens. Rounded, so that the last bits of a platform's log do not show."""
    num_validation_tokens = int(validation_counts.sum())
    if not num_validation_tokens:
        return None
    log_p = np.log((train_counts + 1) / (train_counts.sum() + len(train_counts)))
    return round(float(-(validation_counts * log_p).sum() / num_validation_tokens), 9)
