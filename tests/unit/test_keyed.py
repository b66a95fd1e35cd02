"""Keyed draws: the same for ever, even, and independent of each other."""

import zlib
from itertools import combinations

import numpy as np
import pytest

from mslt.data import keyed

MASK64 = 2**64 - 1
NUM_DRAWS = 100_000


def splitmix64(state: int) -> int:
    """One output of Steele, Lea and Flood's generator, in plain integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK64
    return z ^ (z >> 31)


def slow_bits(seed: int, purpose: str, *counters: int) -> int:
    state = seed
    for part in (zlib.crc32(purpose.encode()), *counters):
        z = ((state + 0x9E3779B97F4A7C15) & MASK64) ^ splitmix64(part & MASK64)
        state = splitmix64((z - 0x9E3779B97F4A7C15) & MASK64)
    return state


def test_mixer_is_splitmix64() -> None:
    assert splitmix64(1234567) == 6457827717110365317  # a published test vector
    for key in ((0, "order"), (3, "next", 1, 2**40), (2**63, "split", 0, -1, 5)):
        assert int(keyed.bits(*key)) == slow_bits(*key), key


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ((0, "order", 0), 0xED018F2D13288557),
        ((7, "mask_fate", 3, 11), 0x298002097E8BA2CC),
        ((2**40 + 5, "next", 1, 2, 3), 0x4BE792FDC86C7A7B),
    ],
)
def test_draws_never_change(key: tuple[int, str, int], expected: int) -> None:
    assert int(keyed.bits(*key)) == expected
    assert keyed.torch_seed(*key) == expected >> 1
    assert float(keyed.uniform(*key)) == (expected >> 11) / 2**53


def test_arrays_draw_what_single_counters_draw() -> None:
    rows, columns = np.arange(3)[:, None], np.arange(4)
    together = keyed.bits(5, "purpose", 1, rows, columns)
    assert together.shape == (3, 4)
    assert together.dtype == np.uint64
    assert together.tolist() == [[int(keyed.bits(5, "purpose", 1, r, c)) for c in range(4)] for r in range(3)]


def test_a_key_can_be_extended() -> None:
    rows, columns = np.arange(3)[:, None], np.arange(4)
    prefix = keyed.bits(5, "purpose", 1, rows)
    before = prefix.copy()
    assert (keyed.extended(prefix, columns) == keyed.bits(5, "purpose", 1, rows, columns)).all()
    assert (keyed.extended(keyed.bits(5, "purpose"), 1, 2) == keyed.bits(5, "purpose", 1, 2)).all()
    assert (prefix == before).all()


def test_every_part_of_the_key_counts() -> None:
    keys = [(1, "a", 2, 3), (2, "a", 2, 3), (1, "b", 2, 3), (1, "a", 3, 2), (1, "a", 2), (1, "a", 2, 3, 0), (1, "a")]
    assert len({int(keyed.bits(*key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("seed", [0, 1, 2**32])
def test_uniform_is_even(seed: int) -> None:
    draws = keyed.uniform(seed, "even", np.arange(NUM_DRAWS))
    assert draws.min() >= 0
    assert draws.max() < 1
    assert len(np.unique(draws)) == NUM_DRAWS
    assert abs(draws.mean() - 1 / 2) < 5 * (1 / 12 / NUM_DRAWS) ** 0.5
    assert abs(draws.var() - 1 / 12) < 5 * (1 / 180 / NUM_DRAWS) ** 0.5
    counts = np.histogram(draws, 100, (0, 1))[0]
    chi_square = ((counts - NUM_DRAWS / 100) ** 2 / (NUM_DRAWS / 100)).sum()
    assert abs(chi_square - 99) < 5 * (2 * 99) ** 0.5


def test_purposes_seeds_and_counters_are_independent() -> None:
    counter = np.arange(NUM_DRAWS)
    streams = {
        "purpose": keyed.uniform(0, "purpose", counter),
        "another purpose": keyed.uniform(0, "another", counter),
        "another seed": keyed.uniform(1, "purpose", counter),
        "the next counter": keyed.uniform(0, "purpose", counter + 1),
        "another epoch": keyed.uniform(0, "purpose", 1, counter),
        "counters swapped": keyed.uniform(0, "purpose", counter, 1),
    }
    for (one, a), (other, b) in combinations(streams.items(), 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / NUM_DRAWS**0.5, (one, other)


@pytest.mark.parametrize("high", [1, 2, 7])
def test_integers_reach_every_value_below_the_bound(high: int) -> None:
    draws = keyed.integers(high, 0, "integers", np.arange(10_000))
    counts = np.bincount(draws)
    assert draws.dtype == np.int64
    assert len(counts) == high
    assert np.abs(counts - 10_000 / high).max() < 5 * (10_000 / high) ** 0.5
    highs = np.array([1, 2, 3])
    assert (keyed.integers(highs, 0, "integers", np.arange(1000)[:, None]) < highs).all()


def test_torch_seeds_fit_into_63_bits() -> None:
    assert all(0 <= keyed.torch_seed(0, "seed", index) < 2**63 for index in range(1000))
