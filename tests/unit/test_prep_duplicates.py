"""Near duplicates against the exact Jaccard similarity, and which of a group stays."""

import numpy as np
import pytest

from data_prep.duplicates import (
    NUM_PERMUTATIONS,
    check_index_fits,
    exact_duplicates,
    hash_text,
    near_duplicates,
    shingles,
    sketch,
)
from mslt.errors import MsltError

SEED = 7
WORDS = [f"word{index}" for index in range(4000)]


def make_texts(count: int, rng: np.random.Generator) -> list[list[str]]:
    return [rng.choice(WORDS, 300).tolist() for _ in range(count)]


def changed(words: list[str], count: int, rng: np.random.Generator) -> str:
    words = list(words)
    for place in rng.choice(len(words), count, replace=False):
        words[place] = "other"
    return " ".join(words)


def jaccard(a: str, b: str) -> float:
    first, second = set(shingles(a)), set(shingles(b))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize(("changes", "share_found"), [(1, (1.0, 1.0)), (3, (0.98, 1.0)), (20, (0.0, 0.0))])
def test_signatures_estimate_jaccard(changes: int, share_found: tuple[float, float]) -> None:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    originals = make_texts(200, rng)
    texts = [" ".join(words) for words in originals] + [changed(words, changes, rng) for words in originals]
    bands, signatures = sketch(texts)
    similarity = np.array([jaccard(a, b) for a, b in zip(texts[:200], texts[200:], strict=True)])
    estimate = (signatures[:200] == signatures[200:]).mean(axis=1)
    # The estimate is a mean of 128 coins: four standard errors for one pair, and for the mean of all.
    error = np.sqrt(similarity * (1 - similarity) / NUM_PERMUTATIONS) + 1 / 256
    assert (np.abs(estimate - similarity) < 4.5 * error).all()
    assert abs((estimate - similarity).mean()) < 4 * error.mean() / np.sqrt(200) + 1 / 256
    repeats = near_duplicates(bands, signatures, threshold=0.8)
    assert not repeats[:200].any()
    assert share_found[0] <= repeats[200:].mean() <= share_found[1]


def test_the_first_of_a_group_stays() -> None:
    rng = np.random.default_rng(SEED)
    a, b = make_texts(2, rng)
    texts = [changed(a, 1, rng), " ".join(b), " ".join(a), changed(a, 1, rng), changed(b, 1, rng)]
    assert near_duplicates(*sketch(texts), threshold=0.8).tolist() == [False, False, True, True, True]


def test_what_resembles_only_dropped_documents_stays() -> None:
    words = [f"w{index}" for index in range(2000)]
    chain = [" ".join(words[start : start + 1000]) for start in range(0, 1000, 40)]
    repeats = near_duplicates(*sketch(chain), threshold=0.8)
    kept = [text for text, repeated in zip(chain, repeats, strict=True) if not repeated]
    assert 4 <= len(kept) < len(chain)
    assert jaccard(kept[0], kept[-1]) < 0.2


def test_short_texts_are_alike_only_when_equal() -> None:
    texts = ["Three little words", "three little WORDS", "three little birds", "a", "b", "a"]
    assert near_duplicates(*sketch(texts), threshold=0.8).tolist() == [False, True, False, False, False, True]


def test_exact_duplicates() -> None:
    hashes = np.array([hash_text(text) for text in ("a", "b", "a", "c", "b", "a")], np.uint64)
    assert exact_duplicates(hashes).tolist() == [False, False, True, False, True, True]


def test_no_documents() -> None:
    assert exact_duplicates(np.empty(0, np.uint64)).tolist() == []
    bands, signatures = sketch([])
    assert near_duplicates(bands, signatures, 0.8).tolist() == []


def test_an_index_too_large_is_refused_before_it_is_built() -> None:
    check_index_fits(1_000_000, near=True, max_index_gb=0.33)
    with pytest.raises(MsltError, match=r"max_index_gb: 0.3, but 1,000,000 documents need 0.32; .*duplicates.near"):
        check_index_fits(1_000_000, near=True, max_index_gb=0.3)
    with pytest.raises(MsltError, match=r"duplicates.exact"):
        check_index_fits(10**9, near=False, max_index_gb=8)
