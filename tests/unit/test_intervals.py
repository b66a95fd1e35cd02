"""Intervals of shares, and of differences on the same rows."""

import numpy as np
import pytest

from mslt.evaluate.intervals import Z_95, clustered, packed, paired, unpacked, wilson


def test_intervals_are_wilsons() -> None:
    low, high = wilson(0.9, 100)  # by hand: (0.9 + 0.0192) / 1.0384 ± 0.0595
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson(0.0, 10)[0] == 0.0
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)


def test_a_window_is_one_draw() -> None:
    """Windows that are all right or all wrong are as many draws as windows, however many tokens they hold."""
    right = np.array([10, 0] * 50)
    low, high = clustered(right, np.full(100, 10))
    assert (low, high) == pytest.approx((0.5 - Z_95 * 0.05, 0.5 + Z_95 * 0.05))
    assert clustered(np.array([3, 5]), np.array([3, 5])) == (1.0, 1.0)
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(400):  # of windows whose tokens stand or fall together
        right = np.where(generator.random(60) < 0.7, 8, 2)
        low, high = clustered(right, np.full(60, 10))
        shares.append(low <= 0.7 * 0.8 + 0.3 * 0.2 <= high)
    assert 0.92 <= np.mean(shares) <= 0.975


def test_what_two_have_wrong_together_is_no_uncertainty() -> None:
    ours = np.array([1, 1, 0, 0, 1.0] * 20)
    theirs = ours.copy()
    theirs[:5] = 0
    low, high = paired(ours, theirs)
    assert (low + high) / 2 == pytest.approx(0.03)
    assert high - low == pytest.approx(2 * Z_95 * (0.03 * 0.97 / 99) ** 0.5)
    assert paired(ours, ours) == (0.0, 0.0)


@pytest.mark.parametrize("count", [1, 7, 8, 1000])
def test_rows_are_kept_as_bits(count: int) -> None:
    right = np.random.default_rng(count).random(count) < 0.5
    assert (unpacked(packed(right), count) == right).all()
    assert len(packed(right)) <= count // 6 + 4
