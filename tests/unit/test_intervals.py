"""Intervals of shares, and of differences on the same rows."""

import numpy as np
import pytest

from mslt.evaluate.intervals import Z_95, clustered, packed, paired, unpacked, wilson


def test_intervals_are_wilsons() -> None:
    low, high = wilson(0.9, 100)  # by hand: (0.9 + 0.0192) / 1.0384 ± 0.0595
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson(0.0, 10)[0] == 0.0
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)


def test_a_passage_is_one_draw() -> None:
    """Passages that are all right or all wrong are as many draws as passages, however many tokens they hold."""
    right = np.array([10, 0] * 50)
    low, high = clustered(right, np.full(100, 10))
    half = Z_95 * (0.25 / 99) ** 0.5
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
    assert clustered(np.array([3]), np.array([5])) == (0.0, 1.0), "of one nothing is known"
    generator = np.random.default_rng(0)
    covers = []
    for _ in range(400):  # of passages whose tokens stand or fall together, short and long ones
        asked = generator.integers(5, 50, 60)
        right = generator.binomial(asked, np.where(generator.random(60) < 0.7, 0.8, 0.2))
        low, high = clustered(right, asked)
        covers.append(low <= 0.7 * 0.8 + 0.3 * 0.2 <= high)
    assert 0.92 <= np.mean(covers) <= 0.975


def test_what_two_have_wrong_together_is_no_uncertainty() -> None:
    ours, once = np.array([[1, 1, 0, 0, 1] * 20]), np.ones(100, dtype=int)
    theirs = ours.copy()
    theirs[:, :5] = 0
    low, high = paired(ours, theirs, once)
    assert (low + high) / 2 == pytest.approx(0.03)
    assert high - low == pytest.approx(2 * Z_95 * (0.03 * 0.97 / 99) ** 0.5)
    assert paired(ours, ours, once) == (0.0, 0.0)
    assert paired(ours[:, :1], theirs[:, :1], once[:1]) == (-1.0, 1.0), "of one nothing is known"
    tens = paired(10 * ours, 10 * theirs, 10 * once)
    assert tens == pytest.approx((low, high)), "rows whose ten answers stand or fall together are rows"


def test_repetitions_that_disagree_are_unsure() -> None:
    """Two probes of the same quality whose every repetition is thrown off as a whole."""
    generator, covers, rows_alone = np.random.default_rng(0), [], []
    for _ in range(400):
        ours, theirs = (
            generator.random((5, 2000)) < np.clip(0.7 + 0.03 * generator.standard_normal((5, 1)), 0, 1)
            for _ in range(2)
        )  # fmt: skip
        low, high = paired(ours, theirs, np.ones(2000))
        covers.append(low <= 0 <= high)
        low, high = paired(ours.mean(0, keepdims=True), theirs.mean(0, keepdims=True), np.ones(2000))
        rows_alone.append(low <= 0 <= high)
    assert np.mean(covers) >= 0.88  # five repetitions are few
    assert np.mean(rows_alone) < 0.6


@pytest.mark.parametrize("count", [1, 7, 8, 1000])
def test_rows_are_kept_as_bits(count: int) -> None:
    right = np.random.default_rng(count).random(count) < 0.5
    assert (unpacked(packed(right), count) == right).all()
    assert len(packed(right)) <= count // 6 + 4
    for other in (count + 8, max(count - 9, 0)):
        with pytest.raises(ValueError, match="are not"):
            unpacked(packed(right), other)
    with pytest.raises(ValueError, match=r"base64|padding"):
        unpacked("?", count)
