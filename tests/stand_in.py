"""Stands in for `mslt train`, and for the clock, in tests of studies: trains nothing and leaves a finished run, whose
losses the recipe alone decides.

FOLDER/calls.txt gets a line for each call. FOLDER/fails.json says of runs, as `told` names them, that one `diverges` or
`stops` before its end.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from mslt.config import Recipe, load_recipe
from mslt.cost import layers_only, step_parts
from mslt.plan import Plan
from mslt.rundir import RunDir
from mslt.schedule import make_plan
from tests.finished import unfinish, write_finished

BEST_RATES = {"full": 0.02}
BEST_RATE = 0.01  # of every other schedule


def loss_of(schedule: str, rate: float, seed: int, steps: int, decay_share: float = 1.0) -> float:
    """Half a nat less for each e-fold of steps, a tenth for full training, and a seed's number of hundredths more. A
    rate that falls late takes a fifth off, of full training it adds that."""
    off = math.log(rate / BEST_RATES.get(schedule, BEST_RATE))
    late = 0.0 if decay_share == 1.0 else 0.2 if schedule == "full" else -0.2
    return 5.0 - 0.5 * math.log(steps / 60) - 0.1 * (schedule == "full") + off**2 / 10 + seed / 100 + late


def measure(plan: Plan) -> list[dict[str, list[float]]]:
    """What is timed of a plan's stages: a layer takes 1 s forward and 2 s backward, in the middle one of three blocks.
    The others were disturbed."""
    parts = [step_parts(layers_only(2), plan.model, stage) for stage in plan.stages]
    return [{part: [9 * seconds, seconds, seconds / 2] for part, seconds in each.items()} for each in parts]


def told(recipe: Recipe) -> str:
    """`full-0.01-0-60`: schedule, learning rate, seed and steps; behind them a decay share that is not 1."""
    late = "" if recipe.optimizer.decay_share == 1.0 else f"-{recipe.optimizer.decay_share:g}"
    rate = recipe.optimizer.learning_rate
    return f"{recipe.schedule.name}-{rate:g}-{recipe.training.seed}-{recipe.schedule.steps}{late}"


def trainer(folder: Path) -> Callable[[Path, Path, Path], None]:
    """What trains for a study, in this process."""

    def train(recipe_path: Path, run: Path, log: Path) -> None:
        recipe, fails = load_recipe(str(recipe_path)), folder / "fails.json"
        with open(folder / "calls.txt", "a") as calls:
            calls.write(f"{told(recipe)}\n")
        log.write_text("trained")
        schedule, plan = recipe.schedule, make_plan(recipe, {})
        optimizer = recipe.optimizer
        loss = loss_of(schedule.name, optimizer.learning_rate, recipe.training.seed, schedule.steps,
                       optimizer.decay_share)  # fmt: skip
        shutil.rmtree(run, ignore_errors=True)
        write_finished(run, plan, lambda step: loss + 1 - step / plan.steps, [0.5] * len(plan.stages), 10**6)
        failure = json.loads(fails.read_text()).get(told(recipe)) if fails.exists() else None
        if failure is not None:
            unfinish(run, len(plan.stages) - 1)
        if failure == "diverges":
            RunDir(run).diverged.write_text("{}")

    return train
