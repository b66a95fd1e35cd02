"""What every threshold would give, from one pass: the logits of all exits, kept. And the threshold for a budget.

R rows, E exits, C labels.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import torch

from mslt.data import keyed
from mslt.errors import MsltError
from mslt.evaluate.exits import Opened
from mslt.evaluate.glue_data import Row
from mslt.evaluate.glue_scores import answers_of, scores
from mslt.evaluate.glue_tasks import Metric, Task
from mslt.heads.exit_rule import (
    ExitRule,
    by_entropy,
    by_patience,
    counts,
    entropy,
    exits_of,
    expected_saving,
    left_with,
)

PAPER_THRESHOLDS = (0.0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
NUM_THRESHOLDS = 100  # between the entropies that occur; from one to the next few rows leave elsewhere
TOLERANCES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # of a regression's scores
MOST_TIMED = 200  # rows of each half that a latency is of
NUM_TRIES = 4  # at a rule that keeps to a latency
T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """The logits of all exits over the rows of a split, [E, R, C], their entropies [E, R], and the labels."""

    task: Task
    metric: Metric
    logits_ERC: torch.Tensor
    entropies_ER: torch.Tensor
    labels: np.ndarray

    @property
    def num_exits(self) -> int:
        return len(self.logits_ERC)

    def of(self, rows: np.ndarray) -> "Kept":
        chosen = torch.from_numpy(rows)
        return Kept(self.task, self.metric, self.logits_ERC[:, chosen], self.entropies_ER[:, chosen], self.labels[rows])

    def answers(self, exit_R: torch.Tensor) -> np.ndarray:
        return np.array(answers_of(self.task, left_with(self.logits_ERC, exit_R).numpy()))

    def exits(self, rule: ExitRule) -> torch.Tensor:
        return exits_of(rule, self.logits_ERC, self.entropies_ER)

    def score(self, answers: np.ndarray) -> float:
        """The task's metric."""
        if self.metric == "accuracy":
            return float((answers == self.labels).mean())
        return scores(self.task, answers.tolist(), self.labels.tolist())[self.metric]

    def at(self, exit: int) -> torch.Tensor:
        return torch.full((len(self.labels),), exit)


def keep(opened: Opened, rows: Sequence[Row], logits_ERC: torch.Tensor) -> Kept:
    labels = np.array([row.label for row in rows])
    return Kept(opened.task, opened.metric, logits_ERC, entropy(logits_ERC), labels)


@dataclass(frozen=True)
class Point:
    """What a rule gives: the share of layers saved, how many rows leave at each exit, all of the task's metrics."""

    rule: ExitRule
    saving: float
    num_leaving: list[int]
    scores: dict[str, float]


def point(kept: Kept, rule: ExitRule) -> Point:
    exit_R = kept.exits(rule)
    num_leaving = counts(exit_R, kept.num_exits)
    found = scores(kept.task, kept.answers(exit_R).tolist(), kept.labels.tolist())
    return Point(rule, expected_saving(num_leaving), num_leaving, found)


def each_exit_alone(kept: Kept) -> list[dict[str, float]]:
    """The scores of every exit, had all rows left there."""
    labels = kept.labels.tolist()
    return [scores(kept.task, kept.answers(kept.at(k)).tolist(), labels) for k in range(kept.num_exits)]


def entropy_rules(kept: Kept) -> list[ExitRule]:
    """The paper's thresholds, those between the entropies that occur, and one above all that can. None for a
    regression."""
    if kept.task.is_regression:
        return []
    found = between(kept.entropies_ER[:-1], NUM_THRESHOLDS)
    return [by_entropy(s) for s in sorted({*PAPER_THRESHOLDS, *found, math.log(len(kept.task.labels)) + 0.01})]


def between(entropies: torch.Tensor, most: int) -> list[float]:
    """Up to `most` thresholds, evenly by rank, each halfway between two neighbours of the values that occur: at a value
    itself, rounding would say who leaves."""
    values = np.unique(entropies.numpy())
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(values.dtype)
    middles = middles[(values[:-1] < middles) & (middles < values[1:])]  # some neighbours have nothing between them
    if not len(middles):
        return []
    ranks = np.linspace(0, len(middles) - 1, min(most, len(middles))).round().astype(int)
    return [float(middle) for middle in middles[ranks]]


def patience_rules(kept: Kept) -> list[ExitRule]:
    """Every patience at which a row can leave early; of a regression with every tolerance."""
    tolerances = TOLERANCES if kept.task.is_regression else (None,)
    return [by_patience(t, tolerance) for tolerance in tolerances for t in range(kept.num_exits - 1, 0, -1)]


def best_within(found: Iterable[tuple[T, float, float]], most_drop: float) -> T | None:
    """Of (what, saving, drop) what saves most and loses at most so much; None where all lose more."""
    within = [(what, saving) for what, saving, drop in found if drop <= most_drop + 1e-9]
    return max(within, key=lambda each: each[1], default=(None, 0.0))[0]


def sweep(kept: Kept, rules: Sequence[ExitRule]) -> list[Point]:
    return [point(kept, rule) for rule in rules]


# Calibration


@dataclass(frozen=True)
class Clock:
    """`seconds_to_E[k]` a row on its own takes to exit k, which predicts; `measure` takes the seconds a row of the
    split's rows of these numbers, one at a time, under a rule."""

    seconds_to_E: Sequence[float]
    measure: Callable[[ExitRule, np.ndarray], float]


@dataclass(frozen=True)
class Calibrated:
    """`rule` was chosen on some rows, all other numbers are of others: means, and 95 % intervals by the bootstrap over
    rows. Drops in the metric's units. Seconds a row on its own, of the first MOST_TIMED, as the time to each exit
    predicts and as measured; None without a clock."""

    rule: ExitRule
    num_chosen_on: int
    num_heldout: int
    drop: float
    drop_interval: tuple[float, float]
    saving: float
    saving_interval: tuple[float, float]
    predicted_s: float | None
    predicted_interval: tuple[float, float] | None
    measured_s: float | None


def halves(num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to choose on, and to judge by."""
    order = np.argsort(keyed.bits(seed, "calibration", np.arange(num_rows)), kind="stable")
    return np.sort(order[: num_rows // 2]), np.sort(order[num_rows // 2 :])


def calibrate(
    kept: Kept,
    most_drop: float | None,
    most_s: float | None,
    clock: Clock | None,
    per_layer: bool,
    by: str,
    seed: int = 0,
) -> Calibrated:
    """The rule that saves most within `most_drop` of the metric, or that loses least and keeps to `most_s` a row by the
    clock. `by` is entropy or patience. MsltError where there is none, or few rows."""
    if (most_drop is None) == (most_s is None):
        raise MsltError("budget: give either a drop or a latency")
    if most_drop is not None and not 0 <= most_drop < 1:
        raise MsltError(f"drop {most_drop}: give a share of the metric, 0 or more and below 1 (0.005 is half a point)")
    if len(kept.labels) < 20:
        raise MsltError(f"{len(kept.labels)} rows: too few to choose on one half and judge by the other; give 20 or "
                        "more")  # fmt: skip
    rules = entropy_rules(kept) if by == "entropy" else patience_rules(kept)
    if not rules:
        raise MsltError("entropy: a regression has none; choose by patience")
    chosen_on, judged_by = halves(len(kept.labels), seed)
    choosing = kept.of(chosen_on)
    if most_s is not None:
        assert clock is not None
        rule = _within_latency(choosing, rules, most_s, clock, chosen_on[:MOST_TIMED])
    else:
        assert most_drop is not None
        rule = _within_drop(choosing, rules, most_drop)
        if per_layer:
            rule = _each_layers_own(choosing, rule, most_drop)
    return _judged(kept, judged_by, rule, len(chosen_on), clock, seed)


def _drop(kept: Kept, exit_R: torch.Tensor) -> float:
    return kept.score(kept.answers(kept.at(kept.num_exits - 1))) - kept.score(kept.answers(exit_R))


def _within_drop(kept: Kept, rules: Sequence[ExitRule], most_drop: float) -> ExitRule:
    exits = ((rule, kept.exits(rule)) for rule in rules)
    best = best_within(
        ((rule, expected_saving(counts(exit_R, kept.num_exits)), _drop(kept, exit_R)) for rule, exit_R in exits),
        most_drop,
    )
    if best is None:
        raise MsltError(f"drop {most_drop}: every rule loses more; allow more")
    return best


def _within_latency(kept: Kept, rules: Sequence[ExitRule], most_s: float, clock: Clock, timed: np.ndarray) -> ExitRule:
    """`timed` are the numbers of the first of `kept`'s rows. Where a rule takes longer or shorter than predicted, the
    others are taken to do so, too, and the next is chosen among those that then keep to the latency; of all that were
    measured and keep to it, the one that loses least; at last the fastest."""
    seconds_to_E = np.array(clock.seconds_to_E)
    exits = [(rule, kept.exits(rule)) for rule in rules]
    found = [(rule, seconds_to_E[e[: len(timed)].numpy()].mean(), _drop(kept, e)) for rule, e in exits]
    fastest = min(found, key=itemgetter(1))
    allowed_s = most_s
    measured: dict[ExitRule, float] = {}
    for _ in range(NUM_TRIES):
        within = [each for each in found if each[1] <= allowed_s] or [fastest]
        rule, predicted_s, _ = min(within, key=itemgetter(2, 1))
        if rule in measured:
            break
        measured[rule] = clock.measure(rule, timed)
        allowed_s = predicted_s * most_s / measured[rule]
    keeping = [each for each in found if measured.get(each[0], math.inf) <= most_s]
    if keeping:
        return min(keeping, key=itemgetter(2, 1))[0]
    measured_s = clock.measure(fastest[0], timed)
    if measured_s > most_s:
        raise MsltError(f"latency {1e3 * most_s:g} ms: the fastest rule takes {1e3 * measured_s:.3g} ms a row here; "
                        "allow more")  # fmt: skip
    return fastest[0]


def _each_layers_own(kept: Kept, start: ExitRule, most_drop: float) -> ExitRule:
    """Thresholds raised one after the other, twice, to what saves most within the drop."""
    if start.patience is not None:
        raise MsltError("a threshold for each layer: goes with entropy, not with patience")
    thresholds = list(start.thresholds * (kept.num_exits - 1 if len(start.thresholds) == 1 else 1))
    for _ in range(2):
        for k in range(kept.num_exits - 1):
            candidates = sorted({thresholds[k], *between(kept.entropies_ER[k], 40)})
            rules = [by_entropy([*thresholds[:k], s, *thresholds[k + 1 :]]) for s in candidates]
            thresholds = list(_within_drop(kept, rules, most_drop).thresholds)
    return by_entropy(thresholds)


def _judged(
    whole: Kept, judged_by: np.ndarray, rule: ExitRule, num_chosen_on: int, clock: Clock | None, seed: int
) -> Calibrated:
    kept = whole.of(judged_by)
    exit_R = kept.exits(rule)
    early, full = kept.answers(exit_R), kept.answers(kept.at(kept.num_exits - 1))
    saved_R = 1 - (exit_R.numpy() + 1) / kept.num_exits
    R = len(kept.labels)

    def drop(rows: np.ndarray) -> float:
        part = kept.of(rows)
        return part.score(full[rows]) - part.score(early[rows])

    seconds = None if clock is None else np.array(clock.seconds_to_E)[exit_R[:MOST_TIMED].numpy()]
    return Calibrated(
        rule=rule,
        num_chosen_on=num_chosen_on,
        num_heldout=R,
        drop=drop(np.arange(R)),
        drop_interval=bootstrap(drop, R, seed),
        saving=float(saved_R.mean()),
        saving_interval=bootstrap(lambda rows: float(saved_R[rows].mean()), R, seed),
        predicted_s=None if seconds is None else float(seconds.mean()),
        predicted_interval=(
            None if seconds is None else bootstrap(lambda rows: float(seconds[rows].mean()), len(seconds), seed)
        ),
        measured_s=None if clock is None else clock.measure(rule, judged_by[:MOST_TIMED]),
    )


def bootstrap(
    statistic: Callable[[np.ndarray], float], num_rows: int, seed: int, num_draws: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile interval over draws of rows with replacement (Efron 1979), keyed by the seed."""
    found = [
        statistic(keyed.integers(num_rows, seed, "bootstrap", draw, np.arange(num_rows))) for draw in range(num_draws)
    ]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def as_plain(rule: ExitRule) -> dict[str, Any]:
    """For JSON."""
    if rule.patience is not None:
        return {"patience": rule.patience, "tolerance": rule.tolerance}
    return {"thresholds": list(rule.thresholds)}


def from_plain(plain: dict[str, Any]) -> ExitRule:
    if "patience" in plain:
        return by_patience(plain["patience"], plain["tolerance"])
    return by_entropy(plain["thresholds"])


def rules_near(kept: Kept, savings: Sequence[float]) -> list[ExitRule]:
    """For each saving the rule by entropy, of a regression by patience, that comes nearest to it; each rule once."""
    found = [(rule, expected_saving(counts(kept.exits(rule), kept.num_exits)))
             for rule in entropy_rules(kept) or patience_rules(kept)]  # fmt: skip
    return list(dict.fromkeys(min(found, key=lambda each: abs(each[1] - saving))[0] for saving in savings))


def plain_sweep(name: str, kept: Kept) -> dict[str, Any]:
    """All that the table and the figures are made of, for JSON."""
    return {
        "exits": name,
        "task": kept.task.name,
        "metric": kept.metric,
        "rows": len(kept.labels),
        "num_exits": kept.num_exits,
        "full": scores(kept.task, kept.answers(kept.at(kept.num_exits - 1)).tolist(), kept.labels.tolist()),
        "alone": each_exit_alone(kept),
        "points": {
            kind: [
                {**as_plain(each.rule), "saving": each.saving, "num_leaving": each.num_leaving, "scores": each.scores}
                for each in sweep(kept, rules)
            ]
            for kind, rules in (("entropy", entropy_rules(kept)), ("patience", patience_rules(kept)))
        },
    }
