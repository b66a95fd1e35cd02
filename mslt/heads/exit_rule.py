"""When a row leaves: at the first exit that is sure of itself (DeeBERT, Xin et al. 2020, arXiv:2004.12993, section
3.2), or after some that agree (PABEE, Zhou et al. 2020, arXiv:2006.04152, section 3.2). One function decides, in a
batch that is being computed and over logits that were kept.

B rows, C labels, E exits, as many as layers: exit k stands behind layer k, at the last all leave.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mslt.errors import MsltError


@dataclass(frozen=True)
class ExitRule:
    """Leave where the entropy is below `thresholds`, one for all exits or one for each but the last; or with `patience`
    where so many exits in a row gave the answer of the one before them: of a regression, one less than `tolerance`
    away."""

    thresholds: tuple[float, ...] = ()
    patience: int | None = None
    tolerance: float | None = None

    def __str__(self) -> str:
        if self.patience is not None:
            return f"patience {self.patience}" + ("" if self.tolerance is None else f", tolerance {self.tolerance:g}")
        return "S = " + ", ".join(f"{threshold:.4g}" for threshold in self.thresholds)


def by_entropy(thresholds: float | Sequence[float]) -> ExitRule:
    """Nats; 0 lets nobody leave early. MsltError for a threshold that is NaN or negative."""
    given = tuple(thresholds) if isinstance(thresholds, Sequence) else (thresholds,)
    for threshold in given:
        if math.isnan(threshold) or threshold < 0:
            raise MsltError(
                f"threshold {threshold}: entropies are 0 nats or more; give 0 (nobody leaves early) or more"
            )
    if not given:
        raise MsltError("threshold: none is given; give one, or one for each exit but the last")
    return ExitRule(tuple(float(threshold) for threshold in given))


def by_patience(patience: int, tolerance: float | None = None) -> ExitRule:
    """MsltError for a patience below 1, or a tolerance that is NaN, infinite, 0 or negative."""
    if patience < 1:
        raise MsltError(f"patience {patience}: so many exits must agree with the one before; give 1 or more")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise MsltError(f"tolerance {tolerance}: scores agree where they are less than that apart; give more than 0")
    return ExitRule(patience=patience, tolerance=tolerance)


def refuse_unfit(rule: ExitRule, num_exits: int, is_regression: bool) -> None:
    """MsltError where the rule is not one for such a model."""
    if rule.patience is None and is_regression:
        raise MsltError("entropy: a regression has none, its exits give a score; let rows leave by patience, with a "
                        "tolerance")  # fmt: skip
    if rule.patience is not None and is_regression != (rule.tolerance is not None):
        raise MsltError(
            "tolerance: none is given, and scores are seldom the same; give how near they must be to agree"
            if is_regression
            else f"tolerance {rule.tolerance}: is for scores, this model's exits agree by their label; leave it out"
        )
    if rule.patience is None and len(rule.thresholds) not in (1, num_exits - 1):
        raise MsltError(f"thresholds: {len(rule.thresholds)} are given; give one for all exits, or {num_exits - 1}, "
                        "one for each but the last")  # fmt: skip


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """[…, C] → […], nats, fp32 whatever the logits are in: never below 0, and finite where they are and lie less than
    3e38 apart. NaN where one is not finite, so that nobody leaves by it."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def begun(num_rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """What `leaves` keeps of rows that no exit has seen yet, [B, 2]: the last answer, and how many agreed with it."""
    kept_B2 = torch.zeros(num_rows, 2, device=device)
    kept_B2[:, 0] = torch.nan  # agrees with nothing
    return kept_B2


def leaves(
    rule: ExitRule, k: int, logits_BC: torch.Tensor, entropy_B: torch.Tensor, kept_B2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows leave at exit k, [B], and what is kept of them for the next."""
    if rule.patience is None:
        return entropy_B < rule.thresholds[k if len(rule.thresholds) > 1 else 0], kept_B2
    if logits_BC.shape[-1] == 1:
        assert rule.tolerance is not None
        answer_B = logits_BC[:, 0].float()
        agrees_B = (answer_B - kept_B2[:, 0]).abs() < rule.tolerance  # strict, as PABEE's τ
    else:
        answer_B = logits_BC.argmax(-1).float()
        agrees_B = answer_B == kept_B2[:, 0]
    count_B = torch.where(agrees_B, kept_B2[:, 1] + 1, 0.0)
    return count_B >= rule.patience, torch.stack([answer_B, count_B], 1)


def exits_of(rule: ExitRule, logits_EBC: torch.Tensor, entropies_EB: torch.Tensor | None = None) -> torch.Tensor:
    """At which exit each row leaves, [B] int64, of the logits of all exits."""
    E, B, C = logits_EBC.shape
    refuse_unfit(rule, E, is_regression=C == 1)
    entropies = entropy(logits_EBC) if entropies_EB is None else entropies_EB
    exit_B, kept_B2 = torch.full((B,), E - 1), begun(B)
    for k in range(E - 1):
        leaves_B, kept_B2 = leaves(rule, k, logits_EBC[k], entropies[k], kept_B2)
        exit_B = torch.where(leaves_B & (exit_B == E - 1), k, exit_B)
    return exit_B


def left_with(logits_EBC: torch.Tensor, exit_B: torch.Tensor) -> torch.Tensor:
    """The logits that rows leave with, [B, C]."""
    return logits_EBC[exit_B, torch.arange(len(exit_B))]


def counts(exit_B: torch.Tensor, num_exits: int) -> list[int]:
    """How many rows leave at each exit."""
    return torch.bincount(exit_B, minlength=num_exits).tolist()


def expected_saving(num_leaving: Sequence[int]) -> float:
    """The share of layers that are not computed, Σ over rows (section 4.2; the paper's code prints 1 minus it)."""
    E, rows = len(num_leaving), sum(num_leaving)
    return 1 - sum((k + 1) * n for k, n in enumerate(num_leaving)) / (E * rows)
