"""Thresholds that are tried, and the choice among them for a budget, with a clock made up."""

from typing import Any

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
    bootstrap,
    calibrate,
    entropy_rules,
    halves,
    patience_rules,
    rules_near,
)
from mslt.evaluate.glue_tasks import TASKS
from mslt.heads.exit_rule import ExitRule, by_entropy, counts, entropy, expected_saving
from mslt.report.exits import chosen

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


@pytest.mark.parametrize(("slower", "most_s"), [(0.7, 3.0), (0.7, 0.9), (1.0, 3.0), (1.3, 3.0)])
def test_a_latency_is_kept_by_the_clock_not_by_the_prediction(kept: Kept, slower: float, most_s: float) -> None:
    clocked = Clocked(kept, slower)
    found = calibrate(kept, None, most_s, Clock(SECONDS_TO, clocked.measure), False, "entropy")
    *tries, (rule, judged) = clocked.timed
    chosen_on, judged_by = halves(R, 0)
    assert rule == found.rule
    assert np.array_equal(judged, judged_by[:MOST_TIMED])
    assert all(np.array_equal(numbers, chosen_on[:MOST_TIMED]) for _, numbers in tries)
    measured = {tried: Clocked(kept, slower).measure(tried, chosen_on[:MOST_TIMED]) for tried, _ in tries}
    assert measured[rule] <= most_s
    choosing = kept.of(chosen_on)
    scores = {tried: choosing.score(choosing.answers(choosing.exits(tried))) for tried in measured}
    assert scores[rule] == max(scores[tried] for tried in measured if measured[tried] <= most_s)
    assert len(tries) == (1 if slower == 1 else 2), "faster than predicted, a slower rule is tried, too"
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


@pytest.mark.parametrize("most_drop", [0.005, 0.02, 0.05])
def test_a_threshold_for_each_layer_saves_no_less_within_the_drop(kept: Kept, most_drop: float) -> None:
    """On the rows that it is chosen on."""
    choosing = kept.of(halves(R, 0)[0])
    whole = choosing.score(choosing.answers(choosing.at(E - 1)))
    savings = []
    for per_layer in (False, True):
        exit_R = choosing.exits(calibrate(kept, most_drop, None, None, per_layer, "entropy").rule)
        assert whole - choosing.score(choosing.answers(exit_R)) <= most_drop + 1e-9
        savings.append(expected_saving(counts(exit_R, E)))
    assert savings[1] >= savings[0] > 0


def test_the_bootstrap_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap(lambda rows: float(values[rows].mean()), len(values), seed=1)
    expected = 1.96 * values.std() / len(values) ** 0.5
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)


def test_rules_near_a_saving_are_the_nearest_each_once(kept: Kept) -> None:
    def saving(rule: ExitRule) -> float:
        return expected_saving(counts(kept.exits(rule), E))

    every = [saving(rule) for rule in entropy_rules(kept)]
    for wanted in (0.0, 0.2, 0.5, 0.75):
        (rule,) = rules_near(kept, [wanted, wanted])
        assert abs(saving(rule) - wanted) == min(abs(each - wanted) for each in every)
    assert rules_near(kept, [0.75, 0.0])[1] == by_entropy(0.0)
    assert not set(rules_near(kept, [0.3])) & set(patience_rules(kept))


def test_the_thresholds_of_the_papers_table_are_chosen_as_it_chooses() -> None:
    def sweep_of(*points: tuple[float, float]) -> dict[str, Any]:
        found = [{"thresholds": [saving], "saving": saving, "scores": {"accuracy": 0.9 - drop / 100}}
                 for saving, drop in points]  # fmt: skip
        return {"metric": "accuracy", "full": {"accuracy": 0.9}, "points": {"entropy": found, "patience": []}}

    def savings(*points: tuple[float, float]) -> list[float]:
        return [point["saving"] for point in chosen(sweep_of(*points))]

    many = [(0.0, 0.0), (0.1, -0.2), (0.2, 0.4), (0.3, 0.6), (0.35, 1.2), (0.5, 2.9), (0.6, 3.1), (0.7, 9.0)]
    assert savings(*reversed(many)) == [0.2, 0.35, 0.5]
    assert savings((0.0, 0.0), (0.4, 5.0)) == [0.0], "nothing else is near enough"
    assert savings((0.0, 0.0), (0.4, 2.5)) == [0.0, 0.4]
    assert savings((0.0, 0.0), (0.3, 0.1), (0.3, 0.3), (0.5, 2.0), (0.4, 1.0))[1:] == [0.4, 0.5]
