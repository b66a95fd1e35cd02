"""Thresholds that are tried, and the choice among them for a budget, with a clock made up."""

import numpy as np
import pytest
import torch

from mslt.errors import MsltError
from mslt.evaluate.exit_sweep import (
    MOST_TIMED,
    NUM_TRIES,
    PAPER_THRESHOLDS,
    Clock,
    Kept,
    best_within,
    between,
    calibrate,
    entropy_rules,
    halves,
)
from mslt.evaluate.glue_tasks import TASKS
from mslt.heads.exit_rule import ExitRule, counts, entropy, expected_saving

R, E = 600, 4
SECONDS_TO = [1.0, 2.0, 3.0, 4.0]


@pytest.fixture(scope="module")
def kept() -> Kept:
    """Later exits are surer, and right more often; entropies on a grid, so that many are the same."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (R,), generator=draw)
    sure_E11 = torch.tensor([0.5, 1.0, 2.0, 4.0]).view(E, 1, 1)
    towards_R2 = 2.0 * torch.nn.functional.one_hot(labels, 2) - 1
    logits = sure_E11 * towards_R2 + 1.5 * torch.randn(E, R, 1, generator=draw) * torch.tensor([1.0, -1.0])
    logits = (4 * logits).round() / 4
    return Kept(TASKS["SST-2"], "accuracy", logits, entropy(logits), labels.numpy())


def test_thresholds_lie_between_the_values_that_occur(kept: Kept) -> None:
    values = np.unique(kept.entropies_ER[:-1].numpy())
    found = between(kept.entropies_ER[:-1], 10_000)
    assert len(found) >= 0.9 * (len(values) - 1)
    assert not set(found) & set(values.tolist())
    numbers_below = [int((values < s).sum()) for s in found]
    assert numbers_below == sorted(set(numbers_below)), "each parts the values in another way"
    few = between(kept.entropies_ER[:-1], 5)
    assert len(few) == 5
    assert (few[0], few[-1]) == (found[0], found[-1])
    savings = [expected_saving(counts(kept.exits(rule), E)) for rule in entropy_rules(kept)]
    assert (savings[0], savings[-1]) == (0, 0.75)
    own = {rule.thresholds[0] for rule in entropy_rules(kept)} - set(PAPER_THRESHOLDS)
    assert not own & set(values.tolist())


def test_neighbours_with_nothing_between_them_have_no_threshold() -> None:
    one = np.float32(0.5)
    assert between(torch.from_numpy(np.array([one, np.nextafter(one, np.float32(1))])), 9) == []
    assert between(torch.tensor([0.5, 0.5]), 9) == []


def test_the_best_saves_most_and_loses_at_most_so_much() -> None:
    found = [("a", 0.1, 0.0), ("b", 0.3, 0.005), ("c", 0.3, 0.001), ("d", 0.5, 0.006)]
    assert best_within(found, 0.005) == "b"
    assert best_within(found, 0.0) == "a"
    assert best_within(found, -0.1) is None


class Clocked:
    """A row takes `slower` times what is predicted."""

    def __init__(self, kept: Kept, slower: float) -> None:
        self.kept, self.slower = kept, slower
        self.timed: list[tuple[ExitRule, np.ndarray]] = []

    def measure(self, rule: ExitRule, numbers: np.ndarray) -> float:
        self.timed.append((rule, numbers))
        exit_R = self.kept.exits(rule)[torch.from_numpy(numbers)].numpy()
        return self.slower * float(np.array(SECONDS_TO)[exit_R].mean())


@pytest.mark.parametrize("slower", [0.9, 1.0, 1.3])
def test_a_latency_is_kept_by_the_clock_not_by_the_prediction(kept: Kept, slower: float) -> None:
    clocked = Clocked(kept, slower)
    found = calibrate(kept, None, 3.0, Clock(SECONDS_TO, clocked.measure), False, "entropy")
    *tries, (rule, judged) = clocked.timed
    chosen_on, judged_by = halves(R, 0)
    assert rule == found.rule
    assert np.array_equal(judged, judged_by[:MOST_TIMED])
    assert all(np.array_equal(numbers, chosen_on[:MOST_TIMED]) for _, numbers in tries)
    assert Clocked(kept, slower).measure(rule, chosen_on[:MOST_TIMED]) <= 3.0
    assert len(tries) == (1 if slower <= 1 else 2)
    assert found.measured_s == pytest.approx(slower * found.predicted_s)
    low, high = found.predicted_interval
    assert low < found.predicted_s < high


def test_a_latency_beyond_the_fastest_rule_is_refused_by_what_was_measured(kept: Kept) -> None:
    clocked = Clocked(kept, 2.0)
    with pytest.raises(MsltError, match=r"latency 1500 ms: the fastest rule takes 2e\+03 ms a row here; allow more"):
        calibrate(kept, None, 1.5, Clock(SECONDS_TO, clocked.measure), False, "entropy")
    assert len(clocked.timed) <= NUM_TRIES + 1


def test_a_drop_needs_no_clock(kept: Kept) -> None:
    found = calibrate(kept, 0.02, None, None, False, "entropy")
    assert found.saving > 0
    assert found.measured_s is found.predicted_s is found.predicted_interval is None
