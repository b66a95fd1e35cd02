"""manifest.json of a shard folder: what the shards hold, what they were made from, how to check them.

Nothing in it but its provenance and the sources' paths varies between two runs over the same input: equal corpora
have equal hashes.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import model_validator

from mslt.errors import MsltError
from mslt.files import canonical_json, sha256_file, sha256_text, write_json
from mslt.validation import Frozen, validate

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILE = "tokenizer.json"
SPLITS = ("train", "validation")


class Amount(Frozen):
    """Bytes are counted as found, before any cleaning: of files and rows all their text; of a dump's page its wikitext
    (of a damaged one its XML); of WikiExtractor's page what stands between its tags."""

    documents: int = 0
    bytes: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(documents=self.documents + other.documents, bytes=self.bytes + other.bytes)


class SourceEntry(Frozen):
    """One source of the recipe: what was read is what was kept and what each rule dropped."""

    kind: str
    path: str
    files: int
    read: Amount
    kept: Amount
    dropped: dict[str, Amount]

    @model_validator(mode="after")
    def adds_up(self) -> "SourceEntry":
        if sum(self.dropped.values(), self.kept) != self.read:
            raise ValueError("read is not what was kept and dropped together")
        return self


class Rules(Frozen):
    """What decided which documents are kept, and in which split."""

    validation_share: float
    min_document_tokens: int
    exact_duplicates: bool
    near_duplicates: bool
    near_duplicate_threshold: float


class TokenizerEntry(Frozen):
    """`sha256` is of tokenizer.json as stored in the shard folder, `others` are those of the files beside it."""

    sha256: str
    others: dict[str, str]
    vocab_size: int
    lowercase: bool


class ShardEntry(Frozen):
    file: str
    documents: int
    sentences: int
    tokens: int
    bytes: int
    sha256: str


class SplitEntry(Frozen):
    documents: int
    sentences: int
    tokens: int
    shards: tuple[ShardEntry, ...]


class Manifest(Frozen):
    """`unigram_entropy_nats`: cross-entropy, in nats a token, of the validation split under the unigram
    distribution of the train split with add-one smoothing: the loss of a model that knows nothing but how
    often each token occurs. None without a validation split. `provenance`: command and versions that made it."""

    format_version: int
    recipe_sha256: str
    sources: tuple[SourceEntry, ...]
    rules: Rules
    tokenizer: TokenizerEntry
    splits: dict[str, SplitEntry]
    unigram_entropy_nats: float | None
    provenance: dict[str, Any]

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON, provenance and the sources' paths apart: the identity of the corpus."""
        apart: Any = {"provenance": True, "sources": {"__all__": {"path"}}}
        return sha256_text(canonical_json(self.model_dump(mode="json", exclude=apart)))

    @model_validator(mode="after")
    def adds_up(self) -> "Manifest":
        for name in SPLITS:
            if name not in self.splits:
                raise ValueError(f"splits.{name} is missing")
        kept = sum(source.kept.documents for source in self.sources)
        held = sum(split.documents for split in self.splits.values())
        if kept != held:
            raise ValueError(f"the sources kept {kept} documents, the splits hold {held}")
        return self


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST_FILE, manifest.model_dump(mode="json"))


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json and check that the folder still fits it: every shard there and of its size, the
    tokenizer the one the shards were made with. Bytes are not checksummed here: that is `mslt data verify`.
    Raises MsltError."""
    manifest = parse_manifest(folder)
    for split in manifest.splits.values():
        for shard in split.shards:
            check_size(folder / shard.file, shard)
    check_tokenizer(folder, manifest.tokenizer)
    return manifest


def parse_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise MsltError(f"{folder}: no such folder; make the shards with `mslt data prepare`")
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise MsltError(
            f"{folder}: holds no {MANIFEST_FILE}, so it is no finished shard folder; "
            "make the shards with `mslt data prepare`"
        )
    remedy = "restore the file, or remove the folder and prepare the shards anew with `mslt data prepare`"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MsltError(f"{path}: not JSON ({error}); {remedy}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        way = "upgrade mslt" if version > FORMAT_VERSION else "prepare the shards anew"
        raise MsltError(f"{path}: format version {version}, this mslt reads {FORMAT_VERSION}; {way}")
    return validate(Manifest, raw, f"{path} ({remedy})")


def check_size(path: Path, shard: ShardEntry) -> None:
    remedy = "restore the file, or remove the folder and prepare the shards anew"
    if not path.is_file():
        raise MsltError(f"{path}: missing, though the manifest lists it; {remedy}")
    size_bytes = path.stat().st_size
    if size_bytes != shard.bytes:
        raise MsltError(f"{path}: {size_bytes} bytes, the manifest says {shard.bytes}; {remedy}")


def check_tokenizer(folder: Path, entry: TokenizerEntry) -> None:
    path = folder / TOKENIZER_FOLDER / TOKENIZER_FILE
    remedy = "prepare the shards anew or restore the tokenizer"
    if not path.is_file():
        raise MsltError(f"{path}: missing; {remedy}")
    found = sha256_file(path)
    if found != entry.sha256:
        raise MsltError(
            f"{path}: shards were made with another tokenizer: sha256 {entry.sha256}, "
            f"the folder holds {found}; {remedy}"
        )
