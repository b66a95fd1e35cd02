"""What each growth schedule would take with given costs of a step, and what to choose for a time."""

from dataclasses import dataclass
from typing import Any

from mslt.config import Recipe, ScheduleConfig, parse_recipe
from mslt.cost import StepCosts, plan_total, step_parts
from mslt.errors import MsltError
from mslt.growth import DOUBLING_SHARES, RETRAIN_SHARE, Growth, find_schedule, stages_of
from mslt.schedule import make_plan

MIN_BLOCK_LAYERS = 3  # the fewest layers a stage adds in Yang et al. 2020, who grow BERT-Base and Large in four alike
# How many times the steps of full training `mslt` took to its loss, by k, in a study of a small encoder on a short
# budget: benchmarks/records/2026-11-23-schedules-cpu.md. Freezing pays where it makes a step faster than that.
STEPS_TO_THE_SAME_LOSS = {2: 1.44, 3: 1.65}
OWN = "this recipe"
MSLT = "mslt, k="
_COMMON = [name for name in ScheduleConfig.model_fields if name not in ("name", "steps")]


@dataclass(frozen=True)
class Forecast:
    """One schedule, for the recipe's steps: seconds in all, and how many times as fast as full training that is."""

    name: str
    k: int | None  # of multi-stage layerwise training with nothing changed
    is_own: bool
    schedule: ScheduleConfig
    total_s: float
    speedup: float

    def steps_in(self, seconds: float) -> int:
        """Steps that fit into a time, divided over the stages in the same way."""
        return int(round(self.schedule.steps * seconds / self.total_s, 6))  # a quotient of 1 is all steps


def alternatives(recipe: Recipe) -> dict[str, Recipe]:
    """By name: full training, then the recipe's own schedule and the others that its depth allows, all for the same
    steps. The own one is called OWN where it is none of the others, and is the same object where it is one."""
    depth, own = recipe.model.num_hidden_layers, recipe.schedule
    own_stages, share = _stages(own, depth), _retrain_share(own)
    shares = DOUBLING_SHARES if depth % 4 == 0 else (30, 70)
    offered: list[tuple[str, str, dict[str, Any]]] = [("full", "full", {})]
    offered += [(f"{MSLT}{k}", "mslt", {"k": k, "retrain_share": share}) for k in range(2, depth + 1)]
    offered += [(name, name, {"shares": shares}) for name in ("stacking", "interleave")]
    offered.append(("one_shot", "one_shot", {}))
    common = {"steps": own.steps, **{name: getattr(own, name) for name in _COMMON}}
    found: dict[str, ScheduleConfig] = {}
    for name, schedule, options in offered:
        candidate = ScheduleConfig(name=schedule, **common, **options)
        stages = _stages(candidate, depth)
        if stages is not None:  # else a k that does not divide the depth, or too few steps for so many stages
            found[name] = own if stages == own_stages else candidate
    if own not in found.values():
        full, *others = found.items()
        found = dict([full, (OWN, own), *others])
    return {name: recipe.model_copy(update={"schedule": schedule}) for name, schedule in found.items()}


def _retrain_share(own: ScheduleConfig) -> float:
    return float(own.options.get("retrain_share", RETRAIN_SHARE)) if own.name == "mslt" else RETRAIN_SHARE


def _stages(schedule: ScheduleConfig, depth: int) -> list[Growth] | None:
    try:
        return stages_of(find_schedule(schedule.name), depth, schedule.steps, schedule.options)
    except ValueError:
        return None


def forecasts(recipe: Recipe, costs: StepCosts) -> list[Forecast]:
    """What every alternative takes, full training first to compare with."""
    found: list[Forecast] = []
    for name, each in alternatives(recipe).items():
        total_s = plan_total(costs, make_plan(each, {}))
        speedup = found[0].total_s / total_s if found else 1.0
        k = int(name.removeprefix(MSLT)) if name.startswith(MSLT) else None
        found.append(Forecast(name, k, each.schedule == recipe.schedule, each.schedule, total_s, speedup))
    return found


def proposal(found: list[Forecast], depth: int) -> Forecast | None:
    """The multi-stage schedule with the largest k of those whose stages add `block_layers(depth)` at least and that are
    fast enough to pay; None where there is none."""
    paying = [one for one in _deep(found, depth) if one.speedup >= pays_from(one.k or 0)]
    return max(paying, key=lambda one: one.k or 0, default=None)


def pays_from(k: int) -> float:
    """How many times as fast as full training a step has to be; above what was measured, as for the largest k that
    was."""
    return STEPS_TO_THE_SAME_LOSS[min(k, max(STEPS_TO_THE_SAME_LOSS))]


def _deep(found: list[Forecast], depth: int) -> list[Forecast]:
    return [one for one in found if one.k is not None and depth // one.k >= block_layers(depth)]


def block_layers(depth: int) -> int:
    """The fewest layers that a stage of a proposal adds: a quarter of the model, MIN_BLOCK_LAYERS at least, or half
    of a shallower model."""
    return max(min(MIN_BLOCK_LAYERS, depth // 2), depth // 4)


def advice(recipe: Recipe, found: list[Forecast], costs: StepCosts, hours: float | None) -> str:
    """What to choose, in words. MsltError where the proposal would be no recipe: the time is too short."""
    depth, best = recipe.model.num_hidden_layers, proposal(found, recipe.model.num_hidden_layers)
    if best is None and (deep := _deep(found, depth)):
        fastest, measured = max(deep, key=lambda one: one.speedup), STEPS_TO_THE_SAME_LOSS.values()
        return (
            f"Freezing will not pay here: `mslt` is at most {fastest.speedup:.2f} times as fast at equal steps (in a "
            f"study of a small encoder it took {min(measured)} to {max(measured)} times the steps to the same loss), "
            f"and {unshrinking_share(recipe, costs):.0%} of a full step is what every stage has: embeddings, heads, "
            "loading, the fixed part of an update. Train with `schedule: {name: full}`."
        )
    if best is None:
        fastest = max(found, key=lambda one: one.speedup)
        return (
            f"No k divides {depth} layers into stages of {max(block_layers(depth), 1)} or more. The fastest at equal "
            f"steps is {fastest.name} ({fastest.speedup:.2f} times)."
        )
    steps = best.schedule.steps if hours is None else best.steps_in(hours * 3600)
    own = recipe.schedule
    kept = {name: value for name, value in own if name in own.model_fields_set - {"name", "steps"} and name in _COMMON}
    schedule = {"name": "mslt", "steps": steps, "k": best.k, "retrain_share": _retrain_share(own), **kept}
    try:
        proposed = parse_recipe({**recipe.model_dump(mode="json"), "schedule": schedule}, "the proposal")
    except MsltError as error:
        given = f"{recipe.schedule.steps} steps" if hours is None else f"--hours {hours}"
        raise MsltError(f"{given}: too short to grow in: {error}") from None
    split = " + ".join(f"{stage.steps:,}" for stage in make_plan(proposed, {}).stages)
    written = ", ".join(f"{name}: {value}" for name, value in schedule.items())
    return (
        f"Proposed: schedule: {{{written}}}, which is {split} steps and "
        f"{duration(best.total_s * steps / best.schedule.steps)}: the largest k that pays with stages of "
        f"{block_layers(depth)} layers or more. At equal steps it learned less than full training in a study of a "
        f"small encoder; full training's time is enough for {best.steps_in(found[0].total_s):,}. Evaluating, saving "
        "and the starts of stages come on top."
    )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def unshrinking_share(recipe: Recipe, costs: StepCosts) -> float:
    """The share of a full step that is neither in its layers nor in its gradients, which no schedule can save."""
    full = make_plan(alternatives(recipe)["full"], {})
    parts = step_parts(costs, full.model, full.stages[0])
    fixed = costs.rest_forward + costs.heads_backward + parts["data"] + costs.reduce_once + costs.optimizer_once
    return fixed / sum(parts.values())
