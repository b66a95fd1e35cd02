"""Text to token shards: documents, sentences, vocabulary, shards, manifest; the folder appears whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_prep.documents import SourceFiles, list_files, read_documents
from data_prep.recipe import DataRecipe
from data_prep.sentences import split_sentences
from data_prep.vocabulary import (
    build_tokenizer,
    encode_sentences,
    read_vocabulary,
    save_tokenizer,
    train_vocabulary,
)
from mslt.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    Manifest,
    Rules,
    SourceEntry,
    TokenizerEntry,
    read_manifest,
    write_manifest,
)
from mslt.data.shards import SHARD_TOKENS, ShardWriter
from mslt.errors import MsltError
from mslt.files import canonical_json, sha256_file, sha256_text, whole_folder

# Called with the stage's name, bytes done and bytes in all.
Progress = Callable[[str, int, int], None]
# Documents tokenized in one call, so that the cores have enough to share.
ENCODED_TOGETHER = 256


@dataclass(frozen=True)
class SplitDocument:
    split: str
    sentences: list[str]


@dataclass
class Tally:
    """What reading has counted so far: documents and bytes of each source, and the documents dropped."""

    documents: list[int]
    bytes: list[int]
    empty: int = 0
    short: int = 0
    kept: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))


def prepare(
    recipe: DataRecipe, out: Path, progress: Progress | None = None, shard_tokens: int = SHARD_TOKENS
) -> tuple[Manifest, bool]:
    """Make the shard folder `out`; return its manifest and whether it was made now.

    A whole folder made from the same recipe and the same files (by name and size) is left as it is. Anything else
    already at `out` is an MsltError, and never overwritten. A run that fails leaves nothing behind.
    """
    out = out.expanduser().resolve()
    progress = progress or (lambda stage, done, total: None)
    sources = [list_files(source) for source in recipe.sources]
    recipe_sha256 = hash_recipe(recipe, sources)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return check_existing(out, recipe_sha256), False
    tokens = read_vocabulary(Path(recipe.vocabulary.file).expanduser()) if recipe.vocabulary.file else None
    with whole_folder(out) as folder:
        tally = Tally([0] * len(sources), [0] * len(sources))
        documents = read_split_documents(recipe, sources, tally, progress)
        spool = folder / "spool.jsonl"
        if tokens is None:
            write_spool(spool, documents)
            check_kept(recipe, tally, "documents with text")
            progress("training the vocabulary", 0, 0)
            vocabulary = recipe.vocabulary
            tokens = train_vocabulary(
                lambda: train_texts(spool), vocabulary.size, vocabulary.lowercase, vocabulary.min_frequency
            )
            documents = read_spool(spool, progress)
        save_tokenizer(folder / TOKENIZER_FOLDER, tokens, recipe.vocabulary.lowercase)
        writers = write_shards(
            folder,
            documents,
            build_tokenizer(tokens, recipe.vocabulary.lowercase),
            recipe,
            tally,
            shard_tokens,
        )
        spool.unlink(missing_ok=True)
        check_kept(recipe, tally, f"documents of {recipe.min_document_tokens} tokens or more")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            recipe_sha256=recipe_sha256,
            sources=tuple(
                SourceEntry(
                    kind=s.source.kind,
                    path=s.source.path or "",
                    files=len(s.files),
                    documents=tally.documents[i],
                    bytes=tally.bytes[i],
                )
                for i, s in enumerate(sources)
            ),
            rules=Rules(
                validation_share=recipe.validation_share,
                min_document_tokens=recipe.min_document_tokens,
                dropped_empty_documents=tally.empty,
                dropped_short_documents=tally.short,
            ),
            tokenizer=TokenizerEntry(
                sha256=sha256_file(folder / TOKENIZER_FOLDER / TOKENIZER_FILE),
                vocab_size=len(tokens),
                lowercase=recipe.vocabulary.lowercase,
            ),
            splits={split: writers[split].entry for split in SPLITS},
            unigram_entropy_nats=unigram_cross_entropy(*(writers[split].token_counts for split in SPLITS)),
        )
        write_manifest(folder, manifest)
    return manifest, True


def hash_recipe(recipe: DataRecipe, sources: list[SourceFiles]) -> str:
    """What decides the shards: the recipe, the names and sizes of all files, and the content of a vocabulary file.
    Where the sources lie does not count."""
    values = recipe.model_dump(mode="json")
    for source, listed in zip(values["sources"], sources, strict=True):
        source["path"] = list(zip(listed.names, listed.sizes_bytes, strict=True))
    if recipe.vocabulary.file:
        path = Path(recipe.vocabulary.file).expanduser()
        read_vocabulary(path)
        values["vocabulary"]["file"] = sha256_file(path)
    return sha256_text(canonical_json([FORMAT_VERSION, values]))


def check_existing(out: Path, recipe_sha256: str) -> Manifest:
    if not (out / MANIFEST_FILE).is_file():
        raise MsltError(f"{out}: exists and is no shard folder; name a new folder for the shards")
    manifest = read_manifest(out)
    if manifest.recipe_sha256 != recipe_sha256:
        raise MsltError(
            f"{out}: was made from another recipe or other source files (recipe sha256 {manifest.recipe_sha256}, "
            f"this one has {recipe_sha256}); name another folder, or remove this one"
        )
    return manifest


def check_kept(recipe: DataRecipe, tally: Tally, meaning: str) -> None:
    kept = f"of {sum(tally.documents)} documents {tally.empty} are empty and {tally.short} too short"
    if not tally.kept["train"]:
        raise MsltError(f"sources: no {meaning} for the train split ({kept}); add text or lower min_document_tokens")
    if recipe.validation_share and not tally.kept["validation"]:
        raise MsltError(
            f"validation_share: no {meaning} among the {recipe.validation_share} held out ({kept}); raise it, add "
            "documents, or set it to 0 to hold out nothing"
        )


def read_split_documents(
    recipe: DataRecipe, sources: list[SourceFiles], tally: Tally, progress: Progress
) -> Iterator[SplitDocument]:
    """Documents of all sources in order, as sentences, each in its split."""
    total_bytes = sum(sum(listed.sizes_bytes) for listed in sources)
    done_bytes = 0
    for index, listed in enumerate(sources):
        for path, name, size_bytes in zip(listed.files, listed.names, listed.sizes_bytes, strict=True):
            progress("reading documents", done_bytes, total_bytes)
            for _, text in read_documents(listed.source, path, name):
                tally.documents[index] += 1
                tally.bytes[index] += len(text.encode())
                sentences = split_sentences(text)
                if sentences:
                    split = choose_split(text, recipe.validation_share)
                    tally.kept[split] += 1
                    yield SplitDocument(split, sentences)
                else:
                    tally.empty += 1
            done_bytes += size_bytes
    progress("reading documents", total_bytes, total_bytes)


def choose_split(text: str, validation_share: float) -> str:
    """By the text's own hash: a document keeps its split when sources are added, and a copy of it goes along."""
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "validation" if draw < validation_share else "train"


def write_spool(path: Path, documents: Iterable[SplitDocument]) -> None:
    """Keep the split documents on disk, one JSON line each, so that the second pass need not split again."""
    with open(path, "w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps([document.split, document.sentences], ensure_ascii=False) + "\n")


def read_spool(path: Path, progress: Progress) -> Iterator[SplitDocument]:
    total_bytes = path.stat().st_size
    done_bytes = 0
    with open(path, "rb") as file:
        for line in file:
            yield SplitDocument(*json.loads(line))
            done_bytes += len(line)
            progress("writing shards", done_bytes, total_bytes)


def train_texts(spool: Path) -> Iterator[str]:
    """The train split's sentences: the vocabulary sees nothing of what is held out."""
    for document in read_spool(spool, lambda stage, done, total: None):
        if document.split == "train":
            yield "\n".join(document.sentences)


def write_shards(
    folder: Path,
    documents: Iterable[SplitDocument],
    tokenizer: Tokenizer,
    recipe: DataRecipe,
    tally: Tally,
    shard_tokens: int,
) -> dict[str, ShardWriter]:
    """Tokenize and write every document that is long enough; those too short move from kept to short in `tally`."""
    vocab_size = tokenizer.get_vocab_size()
    documents = iter(documents)
    with (
        ShardWriter(folder, "train", vocab_size, shard_tokens) as train,
        ShardWriter(folder, "validation", vocab_size, shard_tokens) as validation,
    ):
        writers = {"train": train, "validation": validation}
        while group := list(islice(documents, ENCODED_TOGETHER)):
            encoded = encode_sentences(tokenizer, [s for document in group for s in document.sentences])
            for document in group:
                sentences = list(filter(None, islice(encoded, len(document.sentences))))
                if sum(map(len, sentences)) < recipe.min_document_tokens:
                    tally.short += 1
                    tally.kept[document.split] -= 1
                else:
                    writers[document.split].add(sentences)
    return writers


def unigram_cross_entropy(train_counts: np.ndarray, validation_counts: np.ndarray) -> float | None:
    """Cross-entropy in nats of validation tokens under train's unigrams with add-one smoothing; int64 [V] each.
    None without validation tokens. Rounded, so that the last bits of a platform's log do not show."""
    num_validation_tokens = int(validation_counts.sum())
    if not num_validation_tokens:
        return None
    log_p = np.log((train_counts + 1) / (train_counts.sum() + len(train_counts)))
    return round(float(-(validation_counts * log_p).sum() / num_validation_tokens), 9)
