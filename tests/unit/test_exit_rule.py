"""When a row leaves, and what that saves: D4, D5, D7 and D11 of the specification, worked by hand."""

import math

import pytest
import torch

from mslt.errors import MsltError
from mslt.heads.exit_rule import (
    begun,
    by_entropy,
    by_patience,
    counts,
    entropy,
    exits_of,
    expected_saving,
    leaves,
    left_with,
    refuse_unfit,
)  # fmt: skip


@pytest.mark.parametrize(
    "logits",
    [
        torch.tensor([120.0, 0.0]),
        torch.tensor([88.0, 0.0]),
        torch.tensor([1e38, -1e38]),
        torch.tensor([12.0, -8.0], dtype=torch.float16),
        torch.tensor([60000.0, -60000.0], dtype=torch.float16),
        torch.tensor([20.0, 0.0], dtype=torch.float16),  # where p log p in fp16 is NaN
    ],
)
def test_entropy_is_finite_and_not_negative(logits: torch.Tensor) -> None:
    found = entropy(logits)
    assert found.dtype == torch.float32
    assert torch.isfinite(found)
    assert 0 <= found < 1e-7


@pytest.mark.parametrize("num_labels", [2, 3, 5, 100])
def test_entropy_of_uniform_logits_is_the_logarithm(num_labels: int) -> None:
    for value in (0.0, 3.0, -7.5):
        found = entropy(torch.full((num_labels,), value)).item()
        assert found == pytest.approx(math.log(num_labels), rel=1e-7 if num_labels < 4 else 1e-6)


def test_no_entropy_of_a_million_is_below_zero_and_all_are_numpys() -> None:
    logits = 8 * torch.randn(1_000_000, 2, generator=torch.Generator().manual_seed(0))
    found = entropy(logits)
    assert (found >= 0).all()
    p = logits.double().softmax(-1)
    torch.testing.assert_close(found.double(), torch.special.entr(p).sum(-1), rtol=0, atol=1e-6)


def test_a_threshold_of_zero_lets_nobody_leave_and_one_above_the_most_all() -> None:
    logits_EBC = torch.zeros(3, 4, 2)
    logits_EBC[:, :, 0] = torch.tensor([0.0, 1.0, 5.0, 200.0])  # the last is sure beyond fp32
    assert exits_of(by_entropy(0.0), logits_EBC).tolist() == [2, 2, 2, 2]
    assert exits_of(by_entropy(0.7), logits_EBC).tolist() == [0, 0, 0, 0]
    assert exits_of(by_entropy([0.1, 0.6]), logits_EBC).tolist() == [2, 1, 0, 0]


def test_patience_counts_answers_that_agree_with_the_one_before() -> None:
    answers = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [1, 1, 0, 0, 0]])  # [rows, exits]
    logits_EBC = torch.nn.functional.one_hot(answers.T, 2).float()
    assert exits_of(by_patience(1), logits_EBC).tolist() == [1, 2, 4, 1]
    assert exits_of(by_patience(2), logits_EBC).tolist() == [2, 3, 4, 4]
    assert exits_of(by_patience(3), logits_EBC).tolist() == [3, 4, 4, 4]


def test_patience_takes_scores_with_a_tolerance() -> None:
    scores_EBC = torch.tensor([[1.0, 1.0], [1.4, 3.0], [1.5, 3.2], [9.0, 3.3]])[:, :, None]
    assert exits_of(by_patience(1, 0.25), scores_EBC).tolist() == [2, 2]
    assert exits_of(by_patience(2, 0.25), scores_EBC).tolist() == [3, 3]
    assert exits_of(by_patience(1, 0.5), scores_EBC).tolist() == [1, 2]


def test_scores_as_far_apart_as_the_tolerance_do_not_agree() -> None:
    scores_EBC = torch.tensor([[1.0, 1.0], [1.5, 1.25], [9.0, 9.0]])[:, :, None]
    assert exits_of(by_patience(1, 0.5), scores_EBC).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("by_layer", "saving"),  # replications of issue #4 beside the paper's code: MRPC's 408 rows, layers from 1
    [({12: 408}, 0.0), ({10: 49, 11: 62, 12: 297}, 0.0326797386),
     ({6: 4, 8: 1, 9: 10, 10: 110, 11: 58, 12: 225}, 0.0686274510)],
)  # fmt: skip
def test_expected_saving_is_the_papers_formula(by_layer: dict[int, int], saving: float) -> None:
    num_leaving = [by_layer.get(layer, 0) for layer in range(1, 13)]
    assert expected_saving(num_leaving) == pytest.approx(saving, abs=1e-9)


def test_saving_never_falls_as_the_threshold_rises() -> None:
    logits_EBC = 3 * torch.randn(6, 500, 3, generator=torch.Generator().manual_seed(3))
    thresholds = [0.0, *torch.linspace(1e-3, math.log(3), 60).tolist(), 1.1]
    savings = [expected_saving(counts(exits_of(by_entropy(s), logits_EBC), 6)) for s in thresholds]
    assert savings == sorted(savings)
    assert savings[0] == 0
    assert savings[-1] == pytest.approx(1 - 1 / 6)
    assert len(set(savings)) > 50


def test_rows_leave_with_the_logits_of_their_exit() -> None:
    logits_EBC = torch.arange(12.0).view(3, 2, 2)
    assert left_with(logits_EBC, torch.tensor([2, 0])).tolist() == [[8, 9], [2, 3]]


def test_one_step_equals_the_whole() -> None:
    logits_EBC = torch.randn(5, 40, 2, generator=torch.Generator().manual_seed(1))
    for rule in (by_entropy(0.5), by_patience(2)):
        kept, at = begun(40), exits_of(rule, logits_EBC)
        gone = torch.zeros(40, dtype=torch.bool)
        for k in range(4):
            now, kept = leaves(rule, k, logits_EBC[k], entropy(logits_EBC[k]), kept)
            assert torch.equal(now & ~gone, at == k)
            gone |= now


@pytest.mark.parametrize("threshold", [math.nan, -0.1, -math.inf, [0.1, math.nan], [0.2, -1.0], []])
def test_nonsense_thresholds_are_refused(threshold: float | list[float]) -> None:
    with pytest.raises(MsltError, match=r"threshold.*give"):
        by_entropy(threshold)


@pytest.mark.parametrize(
    ("patience", "tolerance"), [(0, None), (-1, None), (1, math.nan), (1, math.inf), (1, 0), (1, -0.5)]
)
def test_nonsense_patience_is_refused(patience: int, tolerance: float | None) -> None:
    with pytest.raises(MsltError, match=r"(patience|tolerance) .*give"):
        by_patience(patience, tolerance)


def test_a_regression_has_no_entropy_and_a_list_has_as_many_as_ramps() -> None:
    with pytest.raises(MsltError, match=r"regression.*patience"):
        refuse_unfit(by_entropy(0.1), 4, is_regression=True)
    refuse_unfit(by_patience(2, 0.1), 4, is_regression=True)
    with pytest.raises(MsltError, match="tolerance: none is given"):
        refuse_unfit(by_patience(2), 4, is_regression=True)
    with pytest.raises(MsltError, match=r"tolerance 0\.1: is for scores.*leave it out"):
        refuse_unfit(by_patience(2, 0.1), 4, is_regression=False)
    with pytest.raises(MsltError, match="thresholds: 2 are given; give one for all exits, or 3"):
        refuse_unfit(by_entropy([0.1, 0.2]), 4, is_regression=False)
    refuse_unfit(by_entropy([0.1, 0.2, 0.3]), 4, is_regression=False)
