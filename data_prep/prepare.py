"""Text to token shards: documents → clean documents → duplicates → vocabulary → shards → manifest.

Sources fall into pieces. Each phase maps pieces to files, over all cores, in OUT.work; a file that is there is whole
and done, so a run killed at any moment goes on where it stopped. At the end the shard folder takes its name OUT at
once, and OUT.work goes.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_prep.assemble import describe, make_manifest
from data_prep.cleaning import clean_piece, count_documents, read_column, read_dropped, text_bytes
from data_prep.duplicates import EXACT, KEPT, NEAR, check_index_fits, exact_duplicates, near_duplicates
from data_prep.parallel import Progress, Task, run_tasks
from data_prep.recipe import DataRecipe, FileSource, Vocabulary
from data_prep.sources import PIECE_BYTES, Piece, list_pieces
from data_prep.tokenizing import choose_split, tokenize_piece, zip_rules
from data_prep.vocabulary import build_tokenizer, read_pretrained, read_vocabulary, save_tokenizer, train_vocabulary
from mslt.data.manifest import FORMAT_VERSION, MANIFEST_FILE, TOKENIZER_FOLDER, Manifest, read_manifest, write_manifest
from mslt.errors import MsltError
from mslt.files import canonical_json, fsync_folder, lock_alone, sha256_text, whole_file, whole_folder


def prepare(
    recipe: DataRecipe,
    out: Path,
    progress: Progress | None = None,
    num_workers: int = 1,
    piece_bytes: int = PIECE_BYTES,
) -> tuple[Manifest, bool]:
    """Make the shard folder `out`; return its manifest and whether it was made now.

    A whole folder made from the same recipe and the same files (by name and size) is left as it is. Anything else
    already at `out` is an MsltError, and never overwritten. What a run that fails had finished is kept in `out`.work
    for the next.
    """
    out = out.expanduser().resolve()
    progress = progress or (lambda stage, done, total: None)
    check_outside(out, recipe)
    pieces = list_pieces(recipe.sources, piece_bytes)
    tokenizer = existing_tokenizer(recipe.vocabulary)
    recipe_sha256 = hash_recipe(recipe, pieces, tokenizer)
    work = out.with_name(f"{out.name}.work")
    if not work.exists() and (manifest := existing_shards(out, recipe_sha256)):
        return manifest, False
    with locked(work):
        if manifest := existing_shards(out, recipe_sha256):
            shutil.rmtree(work)  # left by a run killed between its last two steps
            return manifest, False
        documents = clean_all(work / "documents", pieces, recipe.duplicates.near, num_workers, progress)
        # Beside the recipe, what the files were when they were read: one that has changed since makes another build.
        build = work / sha256_text(canonical_json([recipe_sha256, [path.name for path in documents]]))[:16]
        build.mkdir(exist_ok=True)
        duplicates = find_duplicates(build / "duplicates.npy", documents, recipe, progress)
        if not (duplicates == KEPT).any():
            raise MsltError(f"sources: hold no text ({describe(list(map(read_dropped, documents)))}); add text")
        shards = build / "shards"
        rules = np.split(duplicates, np.cumsum(count_documents(documents))[:-1])
        make_tokenizer(shards / TOKENIZER_FOLDER, tokenizer, recipe, documents, rules, progress)
        markers = tokenize_all(shards, build, pieces, documents, rules, recipe, num_workers, progress)
        progress("writing the manifest", 0, 0)
        manifest = make_manifest(recipe, recipe_sha256, pieces, documents, shards, markers)
        write_manifest(shards, manifest)
        if out.exists():
            out.rmdir()
        os.rename(shards, out)
        fsync_folder(out.parent)
        shutil.rmtree(work)
    return manifest, True


def check_outside(out: Path, recipe: DataRecipe) -> None:
    """MsltError where `out` lies inside of a source, which would then be read as text of it."""
    for index, source in enumerate(recipe.sources):
        place = source.path if isinstance(source, FileSource) else source.dataset
        if place is not None:
            root = Path(place).expanduser().resolve()
            if out.is_relative_to(root):
                raise MsltError(f"{out}: lies inside of sources.{index}, {root}; name a folder outside of it")


def existing_tokenizer(vocabulary: Vocabulary) -> Tokenizer | None:
    """The tokenizer of the vocabulary a recipe names; None where one is to be trained."""
    if vocabulary.file is not None:
        return build_tokenizer(read_vocabulary(Path(vocabulary.file).expanduser()), vocabulary.lowercase)
    if vocabulary.pretrained is not None:
        return read_pretrained(vocabulary.pretrained)
    return None


def hash_recipe(recipe: DataRecipe, pieces: list[Piece], tokenizer: Tokenizer | None) -> str:
    """What decides the shards: the recipe, the names and sizes of all files, an existing tokenizer. Where sources and
    vocabulary lie does not count, nor what memory was allowed."""
    values = recipe.model_dump(mode="json", exclude={"duplicates": {"max_index_gb"}})
    for source in values["sources"]:
        source.pop("path", None)
    if tokenizer is not None:
        values["vocabulary"] = tokenizer.to_str()
    files = [[piece.source_index, [[part.name, *part[2:]] for part in piece.parts]] for piece in pieces]
    return sha256_text(canonical_json([FORMAT_VERSION, values, files]))


def existing_shards(out: Path, recipe_sha256: str) -> Manifest | None:
    """The manifest of shards made from this recipe; None where there is nothing, MsltError where something else is."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).is_file():
        raise MsltError(f"{out}: exists and is no shard folder; name a new folder for the shards")
    manifest = read_manifest(out)
    if manifest.recipe_sha256 != recipe_sha256:
        raise MsltError(
            f"{out}: was made from another recipe or other source files (recipe sha256 {manifest.recipe_sha256}, "
            f"this one has {recipe_sha256}); name another folder, or remove this one"
        )
    return manifest


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """The folder for what is half done, held for this process; the system lets go when it ends, however it ends."""
    lock = work / ".lock"
    if work.exists() and not lock.exists() and (not work.is_dir() or any(work.iterdir())):
        raise MsltError(f"{work}: is in the way: the shards are prepared there; move it, or name another folder")
    work.mkdir(parents=True, exist_ok=True)
    with lock_alone(lock, f"{work}: another process prepares these shards; wait for it, or end it"):
        yield


def clean_all(folder: Path, pieces: list[Piece], near: bool, num_workers: int, progress: Progress) -> list[Path]:
    """One file of clean documents for each piece."""
    folder.mkdir(exist_ok=True)
    paths = []
    for piece in pieces:
        key = piece.key
        plain, sketched = folder / f"{key}.parquet", folder / f"{key}-sketched.parquet"
        paths.append(sketched if near or sketched.exists() else plain)
    tasks = [
        Task((piece, path, near), piece.size_bytes, path.exists()) for piece, path in zip(pieces, paths, strict=True)
    ]
    run_tasks("reading and cleaning", clean_piece, tasks, num_workers, progress)
    return paths


def find_duplicates(path: Path, documents: list[Path], recipe: DataRecipe, progress: Progress) -> np.ndarray:
    """uint8 [documents]: the index in `RULES` of the rule that takes each document, 0 for none."""
    if not path.exists():
        progress("finding duplicates", 0, 0)
        wanted = recipe.duplicates
        rules = np.zeros(sum(count_documents(documents)), np.uint8)
        if wanted.exact or wanted.near:
            check_index_fits(len(rules), wanted.near, wanted.max_index_gb)
        if wanted.exact:
            rules[exact_duplicates(read_column(documents, "hash", "uint64")[:, 0])] = EXACT
        if wanted.near:
            left = np.flatnonzero(rules == KEPT)
            bands = read_column(documents, "bands", "uint64", rules == KEPT)
            signatures = read_column(documents, "signature", "uint8", rules == KEPT)
            rules[left[near_duplicates(bands, signatures, wanted.threshold)]] = NEAR
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, rules)
    return np.load(path)


def make_tokenizer(
    folder: Path,
    tokenizer: Tokenizer | None,
    recipe: DataRecipe,
    documents: list[Path],
    rules: list[np.ndarray],
    progress: Progress,
) -> None:
    if folder.exists():
        return
    wanted = recipe.vocabulary
    if tokenizer is None:
        progress("training the vocabulary", 0, 0)
        tokens = train_vocabulary(
            lambda: train_texts(documents, rules, recipe), wanted.size, wanted.lowercase, wanted.min_frequency
        )
        tokenizer = build_tokenizer(tokens, wanted.lowercase)
    with whole_folder(folder) as temporary:
        save_tokenizer(temporary, tokenizer)


def train_texts(documents: list[Path], rules: list[np.ndarray], recipe: DataRecipe) -> Iterator[str]:
    """Texts of the train split, at most about `train_gb` of them: the vocabulary sees nothing of what is held out."""
    share = recipe.vocabulary.train_gb * 1e9 / max(sum(map(text_bytes, documents)), 1)
    for path, rules_of_file in zip(documents, rules, strict=True):
        for rows, rules_of_rows in zip_rules(path, rules_of_file):
            hashes = np.array(rows["hash"], np.uint64)
            # The split looks at the hash's high bits, the draw at its low ones.
            drawn = (hashes & np.uint64(2**32 - 1)) < share * 2.0**32
            wanted = drawn & ~choose_split(hashes, recipe.validation_share) & (rules_of_rows == KEPT)
            yield from (rows["text"][index] for index in np.flatnonzero(wanted))


def tokenize_all(
    shards: Path,
    build: Path,
    pieces: list[Piece],
    documents: list[Path],
    rules: list[np.ndarray],
    recipe: DataRecipe,
    num_workers: int,
    progress: Progress,
) -> list[Path]:
    """The shards of every piece; returns the files that say what is in them."""
    markers = [build / f"{piece.index:05d}.json" for piece in pieces]
    tasks = [
        Task(
            (path, rules[i], shards, f"{i:05d}", markers[i], recipe.validation_share, recipe.min_document_tokens),
            path.stat().st_size,
            markers[i].exists(),
        )
        for i, path in enumerate(documents)
    ]
    run_tasks("writing shards", tokenize_piece, tasks, num_workers, progress)
    return markers
