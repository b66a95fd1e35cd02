"""What a study found: each schedule at its best learning rate, for equal time and for equal steps, over seeds."""

import json
import math
import statistics
from dataclasses import dataclass
from itertools import pairwise

from scipy.special import stdtrit

from mslt.rundir import RunDir, read_summaries
from mslt.study import Arm, Study, heldout_loss


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of `values`, one for each seed; the deviation of one value is not known."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        known = len(self.values) > 1 and all(map(math.isfinite, self.values))  # a seed that diverged is infinite
        return statistics.stdev(self.values) if known else None

    def half_width(self, comparisons: int = 1) -> float | None:
        """Of the mean's 95 % interval by Student's t, for as many at once (Bonferroni)."""
        if self.deviation is None:
            return None
        n = len(self.values)
        return float(stdtrit(n - 1, 1 - 0.025 / comparisons)) * self.deviation / math.sqrt(n)

    def is_from_zero(self, comparisons: int = 1) -> bool:
        """Whether that interval leaves out 0; never of one value."""
        half_width = self.half_width(comparisons)
        return half_width is not None and abs(self.mean) > half_width

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.deviation is None else f" ± {self.deviation:.3f}")


@dataclass(frozen=True)
class Finding:
    """One schedule. Losses are held-out MLM at the end, in nats, `minus_baseline` seed by seed. `steps_range` is what
    equal time may be as well, by the spread of the times it is counted from.

    `share_of_time` is what equal steps take of the baseline's time, by the measured time of a step; `clock_share` what
    the runs of equal time took of the baseline's by the clock, on a machine that may have done other things.
    `at_parts` has the losses after shares of the baseline's time. `share_to_baseline` is the share at which its final
    loss is reached, seed by seed, read off lines through the ends of runs, loss over the logarithm of time; None where
    in some seed no end is that good. `at_most`: the earliest end has it already, in some seed.
    """

    name: str
    learning_rate: float
    decay_share: float
    tuned: bool
    steps_at_equal_time: int
    steps_range: tuple[int, int]
    clock_share: float
    at_equal_time: Spread
    at_equal_time_minus_baseline: Spread
    share_of_time: float
    at_equal_steps: Spread
    at_equal_steps_minus_baseline: Spread
    at_parts: dict[float, Spread]
    share_to_baseline: Spread | None
    at_most: bool


def findings(study: Study, chosen: dict[str, list[Arm]]) -> list[Finding]:
    """A finding for each schedule, the baseline's first. `chosen` is what `run_study` returned."""
    found: list[Finding] = []
    full_s = 0.0
    for name, arms in chosen.items():
        timed, stepped = ([arm for arm in arms if arm.equal == equal] for equal in ("time", "steps"))
        at_time = Spread(tuple(heldout_loss(arm) for arm in timed))
        at_steps = Spread(tuple(heldout_loss(arm) for arm in stepped)) if stepped else at_time
        full = found[0].at_equal_time if found else at_time
        share = (stepped or timed)[0].share
        clock_s = statistics.fmean(_train_s(arm) for arm in timed)
        full_s = full_s or clock_s
        at_parts = _at_parts(arms)
        ends = {**at_parts, share: at_steps, 1.0: at_time}
        shares = [
            share_to_reach(target, {at: losses.values[seed] for at, losses in ends.items()})
            for seed, target in enumerate(full.values)
        ]
        reached = tuple(each for each in shares if each is not None)
        to_full = Spread(reached) if len(reached) == len(shares) else None
        found.append(
            Finding(
                name=name,
                learning_rate=timed[0].learning_rate,
                decay_share=study.recipe(timed[0]).optimizer.decay_share,
                tuned=len(study.config.learning_rates) > 1,
                steps_at_equal_time=timed[0].steps,
                steps_range=study.equal_time_range(name),
                clock_share=clock_s / full_s,
                at_equal_time=at_time,
                at_equal_time_minus_baseline=_minus(at_time, full),
                share_of_time=share,
                at_equal_steps=at_steps,
                at_equal_steps_minus_baseline=_minus(at_steps, full),
                at_parts=at_parts,
                share_to_baseline=to_full,
                at_most=bool(found) and to_full is not None and min(ends) in to_full.values,
            )
        )
    return found


def _at_parts(arms: list[Arm]) -> dict[float, Spread]:
    losses: dict[float, list[float]] = {}
    for arm in arms:
        if arm.equal == "part":
            losses.setdefault(arm.share, []).append(heldout_loss(arm))
    return {share: Spread(tuple(each)) for share, each in losses.items()}


def _train_s(arm: Arm) -> float:
    return float(sum(summary["spent_s"]["train"] for summary in read_summaries(RunDir(arm.run))))


def _minus(one: Spread, other: Spread) -> Spread:
    return Spread(tuple(a - b for a, b in zip(one.values, other.values, strict=True)))


def share_to_reach(target: float, losses: dict[float, float]) -> float | None:
    """The share of time at which a loss is first reached, from the losses at some shares; that is early, for losses
    have a seed's chance in them."""
    ends = sorted(losses.items())
    if ends[0][1] <= target:
        return ends[0][0]
    for (early, loss_early), (late, loss_late) in pairwise(ends):
        if loss_late <= target:
            return late * (early / late) ** ((target - loss_late) / (loss_early - loss_late))
    return None


def as_json(found: list[Finding]) -> str:
    """All findings, every seed's loss among them; null for one that diverged."""

    def plain(value: object) -> object:
        if isinstance(value, Spread):
            return {"mean": plain(value.mean), "deviation": value.deviation, "values": [plain(v) for v in value.values]}
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps([{name: plain(value) for name, value in vars(one).items()} for one in found], indent=2)


def table(found: list[Finding]) -> list[list[str]]:
    """A header and a row for each finding, as text."""
    first = found[0].name
    rows = [["schedule", "learning rate", "decay share", "steps in equal time", "by the clock", "MLM at equal time",
             f"minus {first}", "time of equal steps", "MLM at equal steps", f"minus {first}",
             f"time to {first}'s loss"]]  # fmt: skip
    parts = sorted({share for one in found for share in one.at_parts})
    rows[0] += [f"MLM at {share:g} of the time" for share in parts]
    for one in found:
        share = "not reached" if one.share_to_baseline is None else str(one.share_to_baseline)
        low, high = one.steps_range
        rows.append(
            [
                one.name,
                f"{one.learning_rate:g}",
                f"{one.decay_share:g}",
                f"{one.steps_at_equal_time:,}" + (f" ({low:,} to {high:,})" if low < high else ""),
                f"{one.clock_share:.2f}",
                str(one.at_equal_time),
                _signed(one.at_equal_time_minus_baseline),
                f"{one.share_of_time:.2f}",
                str(one.at_equal_steps),
                _signed(one.at_equal_steps_minus_baseline),
                f"at most {share}" if one.at_most else share,
                *(str(one.at_parts[part]) if part in one.at_parts else "–" for part in parts),
            ]
        )
    rows[1][6] = rows[1][9] = rows[1][10] = "–"
    return rows


def _signed(spread: Spread) -> str:
    return f"{spread.mean:+.3f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.3f}")


def verdict(found: list[Finding]) -> list[str]:
    """The winners, whoever they are, in words."""
    first, lines = found[0], []
    equal = {"time": [one.at_equal_time for one in found], "steps": [one.at_equal_steps for one in found]}
    for what, losses in equal.items():
        best, second = sorted(range(len(found)), key=lambda index: losses[index].mean)[:2]
        if not math.isfinite(losses[second].mean):
            lines.append(
                f"At equal {what} all others than {found[best].name} diverged in a seed; it has {losses[best]}."
            )
            continue
        apart = _minus(losses[second], losses[best])
        if apart.deviation is None:
            sure = "; with one seed nothing is known of chance"
        else:
            sure = "" if apart.is_from_zero() else f"; the 95 % interval, ± {apart.half_width():.3f}, holds 0"
        lines.append(
            f"At equal {what} {found[best].name} is best with {losses[best]}, {apart} nats before {found[second].name} "
            f"(seed by seed){sure}. {first.name} has {losses[0]}."
        )
    if first.at_equal_time.deviation is not None:
        others = found[1:]
        told = [one for one in others if one.at_equal_time_minus_baseline.is_from_zero(len(others))]
        names = [f"{one.name} ({'better' if one.at_equal_time_minus_baseline.mean < 0 else 'worse'})" for one in told]
        lines[0] += (
            f" Told from {first.name} by 95 % intervals for {len(others)} at once: {', '.join(names) or 'none'}."
        )
        lines[0] += " Intervals are of seeds; how well equal time is measured is not in them."
    tuned = any(one.tuned for one in found)
    lines[-1] += " The learning rates were tuned at equal time." if tuned else " The learning rate was not tuned."
    reached = {one.name: one.share_to_baseline for one in found[1:] if one.share_to_baseline is not None}
    if reached:
        fastest = min(found[1:], key=lambda one: reached[one.name].mean if one.name in reached else math.inf)
        most = "at most " if fastest.at_most else ""
        lines.append(
            f"{fastest.name} comes to the final loss of {first.name} first, in {most}{reached[fastest.name]} of its "
            "time."
        )
    else:
        lines.append(f"No schedule comes to the final loss of {first.name} in every seed within its time.")
    return lines
