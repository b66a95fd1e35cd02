"""A study: growth schedules compared as an expert would: each with its own learning rate, several seeds, equal steps
and equal time. It plans runs and starts them; every run is an ordinary one and resumes as one.

1. A step of every stage of every schedule is timed, all in turns; equal time is as many steps as take, by these
   figures, what the baseline's take. (So it does not matter what else the machine does while the runs train.)
2. Every schedule trains for equal time at every learning rate with the first seed. Where the best held-out loss is at
   the lowest or highest rate, the next by the same factor is tried, too, until the best lies between others. All of
   that again with each other of the study's decay shares.
3. The rate and decay share that lead get the other seeds. Where their mean then falls behind another's, that gets them,
   until what leads has all: a rate at which one seed in three does not train is no good one.
4. With what won: all seeds for equal steps, and for those shares of the time that the study asks for.
"""

import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field, model_validator

from mslt.config import Recipe, ScheduleConfig, load_recipe, parse_recipe
from mslt.cost import for_timing, medians, waiting_for_data
from mslt.data.manifest import read_manifest
from mslt.engine.ds_config import read_engine_config
from mslt.errors import MsltError
from mslt.files import write_json, write_text
from mslt.plan import Plan, Stage
from mslt.provenance import provenance
from mslt.rundir import RunDir, read_plan
from mslt.schedule import make_plan
from mslt.validation import Frozen, NonNegativeInt, PositiveInt, read_yaml, validate

Equal = Literal["time", "steps", "part"]  # part: of equal time
Measure = Callable[[Plan], list[dict[str, list[float]]]]  # what the parts of a step of each stage take
Train = Callable[[Path, Path, Path], None]  # of a recipe's path, a run directory and a log


TIMING_ROUNDS = 3  # launches that each time some blocks of steps; a figure is the median of all blocks
RESAMPLINGS = 1000
_CHANGE_A_STEPS_TIME = {"name", "implementation", "normalize_gradient", "trust_ratio_bounds"}


class StudyConfig(Frozen):
    """`recipe` gives all but the schedule, the learning rate and the seed. `schedules` are sections of a recipe without
    steps, by name; the first is the baseline, and has `steps`. `optimizers` may add to a schedule's optimizer section.
    `decay_shares` are tried for every schedule, at every rate, beside the one that its optimizer section has. For
    `time_shares` of the baseline's time every schedule trains, too, with what was best for it at the whole.
    """

    recipe: str
    steps: PositiveInt
    schedules: Annotated[dict[str, dict[str, Any]], Field(min_length=2)]
    optimizers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    decay_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    time_shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()

    @model_validator(mode="after")
    def names_and_values_fit(self) -> "StudyConfig":
        found = []
        for name in self.schedules:
            if not re.fullmatch(r"\w[^/\\]*", name):
                found.append(f"schedules.{name}: names a folder; begin with a letter or digit, and use no slash")
        if len({_folder_name(name) for name in self.schedules}) < len(self.schedules):
            found.append("schedules: two names that differ in spaces alone share a folder; rename one")
        for name in sorted(set(self.optimizers) - set(self.schedules)):
            found.append(f"optimizers: {name} is no name under schedules")
        for name, section in self.schedules.items():
            if "steps" in section:
                found.append(f"schedules.{name}.steps: follow from `steps` of the study; remove them here")
        for name, section in self.optimizers.items():
            if "learning_rate" in section:
                found.append(f"optimizers.{name}.learning_rate: is one of learning_rates; remove it here")
            for key in sorted(_CHANGE_A_STEPS_TIME & section.keys()):
                found.append(f"optimizers.{name}.{key}: changes what a step takes; set it in the recipe, for all alike")
        for what in ("seeds", "learning_rates", "decay_shares", "time_shares"):
            values = getattr(self, what)
            if len(set(values)) < len(values):
                found.append(f"{what}: one stands there twice")
        if found:
            raise ValueError("; ".join(found))
        return self


@dataclass(frozen=True)
class Arm:
    """One run of the study. `share` is the time of `steps` over the baseline's, by the measured times of steps, to the
    nearest step; `decay_share` None is its schedule's own."""

    name: str
    equal: Equal
    learning_rate: float
    decay_share: float | None
    seed: int
    steps: int
    share: float
    run: Path


@dataclass(frozen=True)
class Study:
    """A study in its folder: OUT/step-times.json, OUT/runs/NAME/EQUAL-RATE[-decay-SHARE]-SEED, and the recipe of each
    beside it; EQUAL is time, steps or part-SHARE.

    `times` are the timed blocks of each kind of stage, by `kind_of` it, `step_s` is what a step of it takes.
    """

    config: StudyConfig
    folder: Path
    base: Recipe
    times: dict[str, dict[str, list[float]]]

    @cached_property
    def step_s(self) -> dict[str, float]:
        return {kind: self._step_seconds(times) for kind, times in self.times.items()}

    @property
    def title(self) -> str:
        """Of a picture of the first run of each schedule."""
        return f"equal time, seed {self.config.seeds[0]}"

    def arm(
        self, name: str, equal: Equal, learning_rate: float, seed: int, decay_share: float | None = None,
        time_share: float = 1.0,
    ) -> Arm:  # fmt: skip
        full_s, own_s = (self._total_s(each) for each in (next(iter(self.config.schedules)), name))
        share = own_s / full_s if equal == "steps" else time_share
        steps = round(self.config.steps * share * full_s / own_s)
        decay = "" if decay_share is None else f"-decay-{decay_share!r}"
        kind = f"part-{time_share!r}" if equal == "part" else equal
        run = self.folder / "runs" / _folder_name(name) / f"{kind}-{learning_rate!r}{decay}-{seed}"
        return Arm(name, equal, learning_rate, decay_share, seed, steps, share, run)

    def equal_time_range(self, name: str) -> tuple[int, int]:
        """The middle 95 % of the steps that equal time would be with the timed blocks drawn anew: those of all kinds of
        stages together, for they took turns. It is too narrow by what differs between launches."""
        full, own = (self._steps_of_kinds(each) for each in (next(iter(self.config.schedules)), name))
        num_blocks = len(next(iter(next(iter(self.times.values())).values())))
        draws, found = np.random.default_rng(0), []
        for _ in range(RESAMPLINGS):
            blocks = draws.integers(num_blocks, size=num_blocks)
            step_s = {
                kind: self._step_seconds({p: [values[block] for block in blocks] for p, values in times.items()})
                for kind, times in self.times.items()
            }
            full_s, own_s = (sum(n * step_s[kind] for kind, n in steps.items()) for steps in (full, own))
            found.append(round(self.config.steps * full_s / own_s))
        low, high = np.percentile(found, [2.5, 97.5])
        return round(low), round(high)

    def recipe(self, arm: Arm) -> Recipe:
        return variant(self.config, self.base, arm.name, arm.steps, arm.learning_rate, arm.decay_share, arm.seed)

    def other_decay_shares(self, name: str) -> list[float]:
        own = variant(self.config, self.base, name, self.config.steps).optimizer.decay_share
        return [share for share in self.config.decay_shares if share != own]

    def step_seconds(self, stage: Stage) -> float:
        return self.step_s[kind_of(stage)]

    def total_s(self, arms: list[Arm]) -> float:
        """What these runs take by the times of steps, one after the other."""
        full_s = self._total_s(next(iter(self.config.schedules)))
        return sum(arm.share for arm in arms) * full_s

    def _total_s(self, name: str) -> float:
        """What the schedule takes for as many steps as the baseline."""
        return sum(steps * self.step_s[kind] for kind, steps in self._steps_of_kinds(name).items())

    def _steps_of_kinds(self, name: str) -> Counter[str]:
        """Of as many steps as the baseline has, those of each kind of stage."""
        plan = make_plan(variant(self.config, self.base, name, self.config.steps), {})
        found: Counter[str] = Counter()
        for stage in plan.stages:
            found[kind_of(stage)] += stage.steps
        return found

    def _step_seconds(self, times: dict[str, list[float]]) -> float:
        """Of a step, from the timed blocks of its parts."""
        (parts,) = medians([times])
        computing = sum(seconds for part, seconds in parts.items() if part != "data")
        return computing + waiting_for_data(parts["data"], computing, self.base.watch.loader_workers)


def kind_of(stage: Stage) -> str:
    """Stages of one study that say the same here take as long for a step."""
    return (
        f"{stage.depth} layers, frozen: {', '.join(stage.frozen) or 'none'}"
        + ("" if stage.frozen_dropout or not stage.frozen else ", their dropout off")
        + ("" if stage.frozen_precision == "exact" or not stage.frozen else f", in {stage.frozen_precision}")
    )


def variant(
    config: StudyConfig, base: Recipe, name: str, steps: int, learning_rate: float | None = None,
    decay_share: float | None = None, seed: int = 0,
) -> Recipe:  # fmt: skip
    """The recipe of one run of a study; without a learning rate with the first that is tried. Warm-ups are the same
    share of a longer or shorter run. MsltError lists what is wrong with the schedule."""
    optimizer = {**base.optimizer.model_dump(mode="json"), **config.optimizers.get(name, {})}
    optimizer["learning_rate"] = learning_rate or config.learning_rates[0]
    if decay_share is not None:
        optimizer["decay_share"] = decay_share
    schedule = {**config.schedules[name], "steps": steps}
    for section, key in ((optimizer, "warmup_steps"), (schedule, "rewarmup_steps")):
        if isinstance(section.get(key), int):
            section[key] = round(section[key] * steps / config.steps)
    training = {**base.training.model_dump(mode="json"), "seed": seed}
    sections = {"schedule": schedule, "optimizer": optimizer, "training": training}
    return parse_recipe({**base.model_dump(mode="json"), **sections}, f"study: {name}")


def _folder_name(schedule_name: str) -> str:
    return schedule_name.replace(" ", "-")


def open_study(path: Path, folder: Path, shards: Path, num_workers: int, measure: Measure) -> Study:
    """Read the study, check every schedule, and time a step of each kind of stage where the folder has no times yet.

    MsltError, before anything is written, for a study that cannot be run, or a folder with another one, or with runs
    on other shards or another number of workers. Other seeds, rates, decay shares and time shares are the same study,
    and so are more schedules whose kinds of stages have been timed.
    """
    config, base = read_study(path)
    plans = _plans(config, base)
    kinds = {kind_of(stage): for_timing(stage) for plan in plans for stage in plan.stages}
    described = {
        "study": config.model_dump(mode="json"),
        "recipe": base.model_dump(mode="json"),
        "shards_sha256": read_manifest(shards).hash,
        "workers": num_workers,
    }
    file, times_file = folder / "study.json", folder / "step-times.json"
    if file.exists() and (changed := _changed(json.loads(file.read_text()), described)):
        raise MsltError(f"{folder}: holds another study (its {changed} differ); take another --out")
    if times_file.exists() and (untimed := sorted(kinds.keys() - json.loads(times_file.read_text())["stages"].keys())):
        raise MsltError(
            f"{folder}: holds no times of {'; '.join(untimed)}, which had to take turns with the others; take another "
            "--out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, described)
    if not times_file.exists():
        timing = plans[0].model_copy(update={"stages": tuple(kinds.values())})
        rounds = [measure(timing) for _ in range(TIMING_ROUNDS)]
        times = {
            kind: {part: [second for each in rounds for second in each[index][part]] for part in rounds[0][index]}
            for index, kind in enumerate(kinds)
        }
        write_json(times_file, {"provenance": provenance(), "stages": times})
    study = Study(config, folder, base, json.loads(times_file.read_text())["stages"])
    for name in config.schedules:  # as long as they will be
        for share in (*config.time_shares, 1.0):
            study.recipe(study.arm(name, "part", config.learning_rates[0], config.seeds[0], time_share=share))
    return study


def read_study(path: Path) -> tuple[StudyConfig, Recipe]:
    """The study and the recipe it changes, for full training."""
    config = validate(StudyConfig, read_yaml(path), f"study {path}")
    source = config.recipe
    if source.endswith(".yaml"):
        source = str(path.parent / source)  # counts from the file that says it
    base = load_recipe(source)
    if base.training.micro_batch_size == "auto":
        raise MsltError(
            f"study {path}: training.micro_batch_size auto of {source}: every run would measure its own, and the times "
            "of steps would be another's; write a number"
        )
    return config, base.model_copy(update={"schedule": ScheduleConfig(name="full", steps=config.steps)})


def _plans(config: StudyConfig, base: Recipe) -> list[Plan]:
    """A plan for each schedule, the baseline's first; MsltError lists the mistakes of all of them."""
    plans, wrong = [], []
    for name in config.schedules:
        try:
            plans.append(make_plan(variant(config, base, name, config.steps), read_engine_config(base.engine)))
        except MsltError as error:
            wrong.append(str(error))
    if wrong:
        raise MsltError("\n".join(wrong))
    return plans


_ADD_RUNS = {"seeds", "learning_rates", "decay_shares", "time_shares"}  # and change none


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    known = before.get("study", {}).get("schedules", {})

    def fixed(described: dict[str, Any]) -> dict[str, Any]:
        study = {key: value for key, value in described.get("study", {}).items() if key not in _ADD_RUNS}
        baseline = next(iter(study.get("schedules", {})), None)
        for key in ("schedules", "optimizers"):
            study[key] = {name: section for name, section in study.get(key, {}).items() if name in known}
        return {**described, "study": study, "baseline": baseline}

    before, after = fixed(before), fixed(after)
    return ", ".join(key for key in after if before.get(key) != after[key])


def run_study(study: Study, train: Train, num_at_once: int) -> dict[str, list[Arm]]:
    """Run everything that is not done, and return the arms that count, by name: at the best rate of each schedule, for
    equal time; of what costs otherwise than the baseline, for equal steps; and for parts of the time.

    MsltError where a run stops for another reason than that it diverges; what is done stays done.
    """
    config = study.config
    while True:
        tuning = {name: tuning_arms(study, name) for name in config.schedules}
        _run(study, "learning rates", [arm for arms in tuning.values() for arm in arms], train, num_at_once)
        if all(len(arms) == len(tuning_arms(study, name)) for name, arms in tuning.items()):
            break
    while True:
        timed = {name: leading_arms(study, name) for name in config.schedules}
        _run(study, "equal time", [arm for arms in timed.values() for arm in arms], train, num_at_once)
        if all(arms == leading_arms(study, name) for name, arms in timed.items()):
            break
    stepped = {
        name: [study.arm(name, "steps", a.learning_rate, a.seed, a.decay_share) for a in arms]
        for name, arms in timed.items() if arms[0].steps != config.steps  # else equal steps are equal time
    }  # fmt: skip
    _run(study, "equal steps", [arm for arms in stepped.values() for arm in arms], train, num_at_once)
    parts = {
        name: [
            study.arm(name, "part", a.learning_rate, a.seed, a.decay_share, share)
            for share in config.time_shares for a in arms
        ]
        for name, arms in timed.items()
    }  # fmt: skip
    if config.time_shares:
        _run(study, "part of the time", [arm for arms in parts.values() for arm in arms], train, num_at_once)
    return {name: [*arms, *stepped.get(name, []), *parts[name]] for name, arms in timed.items()}


def tuning_arms(study: Study, name: str) -> list[Arm]:
    """What a schedule's learning rate and decay share are chosen from: for each share, its own first, by rising
    rates."""
    return [arm for share in (None, *study.other_decay_shares(name)) for arm in _bracket(study, name, share)]


def seeds_of(study: Study, tuned: Arm) -> list[Arm]:
    """A tuning arm's setting with each of the study's seeds."""
    return [
        study.arm(tuned.name, tuned.equal, tuned.learning_rate, seed, tuned.decay_share) for seed in study.config.seeds
    ]


def leading_arms(study: Study, name: str) -> list[Arm]:
    """Of the setting with the best mean over those seeds that are done, all seeds; where one diverges in each, of that
    with the best first. MsltError where the first diverges in each."""

    def rank(arms: list[Arm]) -> tuple[float, float]:
        return statistics.fmean(heldout_loss(arm) for arm in arms if is_done(arm)), heldout_loss(arms[0])

    best = min((seeds_of(study, arm) for arm in tuning_arms(study, name)), key=rank)
    if heldout_loss(best[0]) == math.inf:
        raise MsltError(f"study {study.folder}: {name} diverges at every learning rate; add lower ones")
    return best


def _bracket(study: Study, name: str, decay_share: float | None) -> list[Arm]:
    """The study's learning rates. Once all are done and the best is the lowest or highest, one more beyond it, as far
    from it as the next, and so on."""

    def arm(rate: float) -> Arm:
        return study.arm(name, "time", rate, study.config.seeds[0], decay_share)

    arms = [arm(rate) for rate in sorted(study.config.learning_rates)]
    while len(arms) > 1 and all(map(is_done, arms)):
        losses = [heldout_loss(each) for each in arms]
        best = losses.index(min(losses))
        if min(losses) == math.inf or 0 < best < len(arms) - 1:
            break
        rate, inner = arms[best].learning_rate, arms[1 if best == 0 else best - 1].learning_rate
        arms.insert(0 if best == 0 else len(arms), arm(float(f"{rate * rate / inner:.3g}")))
    return arms


def heldout_loss(arm: Arm) -> float:
    """Held-out MLM loss at the end of a run, in nats; infinite where it diverged. MsltError for what is not done, and
    for a run of other steps."""
    run = RunDir(arm.run)
    if not is_done(arm):
        raise MsltError(f"{arm.run}: is not done")
    plan = read_plan(run)
    if plan.steps != arm.steps:
        raise MsltError(
            f"{arm.run}: is of {plan.steps:,} steps, and the study's is of {arm.steps:,}; take another --out"
        )
    if run.first_unfinished(plan) is not None:
        return math.inf
    summary = json.loads(run.stage(len(plan.stages) - 1).summary.read_text())
    return float(summary["evaluation_after"]["mlm_loss"])


def is_done(arm: Arm) -> bool:
    run = RunDir(arm.run)
    return run.diverged.exists() or (run.plan.exists() and run.first_unfinished(read_plan(run)) is None)


def _run(study: Study, what: str, arms: list[Arm], train: Train, num_at_once: int) -> None:
    """Train what is not done of the arms. After the first failure no other starts."""
    waiting = [arm for arm in arms if not is_done(arm)]
    hours = study.total_s(waiting) / num_at_once / 3600
    said = f"{what}: {len(arms)} runs, {len(arms) - len(waiting)} done; the others take about {hours:.1f} h of training"
    print(said, file=sys.stderr, flush=True)
    with ThreadPoolExecutor(num_at_once) as pool:
        futures = [pool.submit(_train, study, arm, train) for arm in waiting]
        try:
            for number, (arm, future) in enumerate(zip(waiting, futures, strict=True), 1):
                future.result()
                run = arm.run.relative_to(study.folder / "runs")
                said = f"{number} of {len(waiting)}, {run}: {arm.steps:,} steps, held-out MLM {heldout_loss(arm):.4f}"
                print(said, file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _train(study: Study, arm: Arm, train: Train) -> None:
    arm.run.parent.mkdir(parents=True, exist_ok=True)
    recipe, log = (arm.run.parent / f"{arm.run.name}.{ending}" for ending in ("yaml", "log"))
    write_text(recipe, yaml.safe_dump(study.recipe(arm).model_dump(mode="json"), sort_keys=False))
    train(recipe, arm.run, log)
    if not is_done(arm):
        raise MsltError(f"{arm.run}: stopped before its end; {log} says why. The same command goes on")
