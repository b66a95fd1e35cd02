"""What every threshold would give, from one pass: the logits of all exits, kept. And the threshold for a budget.

R rows, E exits, C labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
NUM_QUANTILES = 100  # of the entropies that occur; between two of them few rows leave elsewhere
TOLERANCES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # of a regression's scores


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
    """The paper's thresholds, and quantiles of the entropies that occur. None for a regression."""
    if kept.task.is_regression:
        return []
    quantiles = np.quantile(kept.entropies_ER[:-1].numpy(), np.linspace(0, 1, NUM_QUANTILES))
    return [by_entropy(s) for s in sorted({*PAPER_THRESHOLDS, *(float(q) for q in quantiles)})]


def patience_rules(kept: Kept) -> list[ExitRule]:
    """Every patience at which a row can leave early; of a regression with every tolerance."""
    tolerances = TOLERANCES if kept.task.is_regression else (0.0,)
    return [by_patience(t, tolerance) for tolerance in tolerances for t in range(kept.num_exits - 1, 0, -1)]


def best_within(points: Sequence[Point], metric: Metric, full: float, most_drop: float) -> Point | None:
    """The largest saving at which the metric is at most so much below the whole model's."""
    within = [each for each in points if full - each.scores[metric] <= most_drop + 1e-12]
    return max(within, key=lambda each: each.saving, default=None)


def sweep(kept: Kept, rules: Sequence[ExitRule]) -> list[Point]:
    return [point(kept, rule) for rule in rules]


# Calibration


@dataclass(frozen=True)
class Calibrated:
    """`rule` was chosen on some rows, all other numbers are of others: means, and 95 % intervals by the bootstrap over
    rows. Drops in the metric's units, latencies in seconds, None where none was measured."""

    rule: ExitRule
    num_chosen_on: int
    num_heldout: int
    drop: float
    drop_interval: tuple[float, float]
    saving: float
    saving_interval: tuple[float, float]
    latency_s: float | None
    latency_interval: tuple[float, float] | None


def halves(num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to choose on, and to judge by."""
    order = np.argsort(keyed.bits(seed, "calibration", np.arange(num_rows)), kind="stable")
    return np.sort(order[: num_rows // 2]), np.sort(order[num_rows // 2 :])


def calibrate(
    kept: Kept,
    most_drop: float | None,
    most_s: float | None,
    seconds_to_E: Sequence[float] | None,
    per_layer: bool,
    by: str,
    seed: int = 0,
) -> Calibrated:
    """The rule that saves most within `most_drop` of the metric, or that loses least within `most_s` a row, where
    reaching exit k takes `seconds_to_E[k]`. `by` is entropy or patience. MsltError where there is none, or few rows."""
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
    choosing, judging = (kept.of(rows) for rows in halves(len(kept.labels), seed))
    if most_s is not None:
        assert seconds_to_E is not None
        rule = _within_latency(choosing, rules, most_s, np.array(seconds_to_E))
    else:
        assert most_drop is not None
        rule = _within_drop(choosing, rules, most_drop)
        if per_layer:
            rule = _each_layers_own(choosing, rule, most_drop)
    return _judged(judging, rule, len(choosing.labels), seconds_to_E, seed)


def _drop(kept: Kept, exit_R: torch.Tensor) -> float:
    return kept.score(kept.answers(kept.at(kept.num_exits - 1))) - kept.score(kept.answers(exit_R))


def _within_drop(kept: Kept, rules: Sequence[ExitRule], most_drop: float) -> ExitRule:
    found = [(rule, kept.exits(rule)) for rule in rules]
    within = [(rule, exit_R) for rule, exit_R in found if _drop(kept, exit_R) <= most_drop + 1e-12]
    if not within:
        raise MsltError(f"drop {most_drop}: every rule loses more; allow more")
    return min(within, key=lambda each: float(each[1].float().mean()))[0]


def _within_latency(kept: Kept, rules: Sequence[ExitRule], most_s: float, seconds_to_E: np.ndarray) -> ExitRule:
    found = [(rule, kept.exits(rule)) for rule in rules]
    within = [(rule, exit_R) for rule, exit_R in found if seconds_to_E[exit_R.numpy()].mean() <= most_s]
    if not within:
        least = min(seconds_to_E[exit_R.numpy()].mean() for _, exit_R in found)
        raise MsltError(f"latency {1e3 * most_s:g} ms: the fastest rule takes {1e3 * least:.3g} ms a row here; allow "
                        "more")  # fmt: skip
    return min(within, key=lambda each: _drop(kept, each[1]))[0]


def _each_layers_own(kept: Kept, start: ExitRule, most_drop: float) -> ExitRule:
    """Thresholds raised one after the other, twice, to what saves most within the drop."""
    if start.patience is not None:
        raise MsltError("a threshold for each layer: goes with entropy, not with patience")
    thresholds = list(start.thresholds * (kept.num_exits - 1 if len(start.thresholds) == 1 else 1))
    for _ in range(2):
        for k in range(kept.num_exits - 1):
            candidates = sorted({thresholds[k], *np.quantile(kept.entropies_ER[k].numpy(), np.linspace(0, 1, 41))})
            rules = [by_entropy([*thresholds[:k], float(s), *thresholds[k + 1 :]]) for s in candidates]
            thresholds = list(_within_drop(kept, rules, most_drop).thresholds)
    return by_entropy(thresholds)


def _judged(
    kept: Kept, rule: ExitRule, num_chosen_on: int, seconds_to_E: Sequence[float] | None, seed: int
) -> Calibrated:
    exit_R = kept.exits(rule)
    early, full = kept.answers(exit_R), kept.answers(kept.at(kept.num_exits - 1))
    saved_R = 1 - (exit_R.numpy() + 1) / kept.num_exits
    R = len(kept.labels)

    def drop(rows: np.ndarray) -> float:
        part = kept.of(rows)
        return part.score(full[rows]) - part.score(early[rows])

    seconds_R = None if seconds_to_E is None else np.array(seconds_to_E)[exit_R.numpy()]
    return Calibrated(
        rule=rule,
        num_chosen_on=num_chosen_on,
        num_heldout=R,
        drop=drop(np.arange(R)),
        drop_interval=bootstrap(drop, R, seed),
        saving=float(saved_R.mean()),
        saving_interval=bootstrap(lambda rows: float(saved_R[rows].mean()), R, seed),
        latency_s=None if seconds_R is None else float(seconds_R.mean()),
        latency_interval=None if seconds_R is None else bootstrap(lambda rows: float(seconds_R[rows].mean()), R, seed),
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
        return by_patience(plain["patience"], plain.get("tolerance", 0.0))
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
