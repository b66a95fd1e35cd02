"""Documents that repeat an earlier one: by hash, and nearly, by MinHash.

A document's sketch is the MinHash signature (Broder 1997) of its word 5-grams, in rensa's R-MinHash, of which the low
byte of each of 128 values is kept (b-bit MinHash, Li and König 2010), and 16 band hashes of 8 values each
(Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4). Two documents that agree in a band are
candidates; they are near duplicates where their signatures agree in `threshold` of the values. A pair of similarity
0.8 meets in a band with probability 0.95, one of 0.9 with 0.9999. A document that resembles only dropped ones stays.
"""

import hashlib

import numpy as np
from rensa import RMinHash

from mslt.errors import MsltError

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
NUM_BANDS = 16
SEED = 1
KEPT, EXACT, NEAR = 0, 1, 2
RULES = ("kept", "exact_duplicate", "near_duplicate")
# What a document costs in memory while duplicates are found: bands 128, signature 128, and 50 to sort a band (306
# measured, pairs apart). Without near duplicates: hash 8, and 32 to sort.
NEAR_INDEX_BYTES = 320
EXACT_INDEX_BYTES = 40
# Pairs whose signatures are compared at once: 32 MB.
PAIRS_TOGETHER = 2**17


def hash_text(text: str) -> int:
    """64 bits of SHA-256: among 10^8 documents two different ones agree with probability 0.0003."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def sketch(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Band hashes, uint64 [N, NUM_BANDS], and signatures, uint8 [N, NUM_PERMUTATIONS]."""
    digests = np.empty((len(texts), NUM_PERMUTATIONS), np.uint32)
    for row, text in enumerate(texts):
        minhash = RMinHash(NUM_PERMUTATIONS, SEED)
        minhash.update(shingles(text))
        digests[row] = minhash.digest()
    # Multilinear hashing: odd multipliers, one for each place in a band.
    multipliers = np.random.default_rng(SEED).integers(2**63, size=NUM_PERMUTATIONS // NUM_BANDS, dtype=np.uint64)
    grouped = digests.reshape(len(texts), NUM_BANDS, NUM_PERMUTATIONS // NUM_BANDS).astype(np.uint64)
    bands = ((grouped + np.uint64(1)) * (2 * multipliers + 1)).sum(axis=2, dtype=np.uint64)
    return bands, digests.astype(np.uint8)


def shingles(text: str) -> list[str]:
    """The word 5-grams of a text, without case; the whole of one that has fewer words."""
    words = text.lower().split()
    return [" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(len(words) - SHINGLE_WORDS, 0) + 1)]


def check_index_fits(num_documents: int, near: bool, max_index_gb: float) -> None:
    needed_gb = num_documents * (NEAR_INDEX_BYTES if near else EXACT_INDEX_BYTES) / 1e9
    if needed_gb > max_index_gb:
        way = "raise it or set duplicates.near to false" if near else "raise it or set duplicates.exact to false"
        raise MsltError(
            f"duplicates.max_index_gb: {max_index_gb:g}, but {num_documents:,} documents need {needed_gb:.2g}; {way}"
        )


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """bool [N]: documents whose hash (uint64 [N]) an earlier one has."""
    repeats = np.ones(len(hashes), bool)
    repeats[np.unique(hashes, return_index=True)[1]] = False
    return repeats


def near_duplicates(bands: np.ndarray, signatures: np.ndarray, threshold: float) -> np.ndarray:
    """bool [N]: documents that nearly repeat an earlier one that stays; see `sketch` for the arguments.

    In a band each document is compared with the one before it and the first of those with the same hash."""
    pairs = [np.empty((0, 2), np.int64)]
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        values = band[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = values[1:] != values[:-1]
        first = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
        later = np.flatnonzero(~is_first)
        for start in range(0, len(later), PAIRS_TOGETHER):
            place = later[start : start + PAIRS_TOGETHER]
            for other in (place - 1, first[place]):
                earlier, document = order[other], order[place]
                similar = (signatures[earlier] == signatures[document]).mean(axis=1) >= threshold
                pairs.append(np.stack([document, earlier], 1)[similar])
    repeats = np.zeros(len(bands), bool)
    # By document: when one is looked at, all before it are decided.
    for document, earlier in np.unique(np.concatenate(pairs), axis=0).tolist():
        repeats[document] |= not repeats[earlier]
    return repeats
