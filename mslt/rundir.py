"""The run directory: where everything of a run lies, and what its files say about how far it is.

run/
  recipe.yaml  plan.json  provenance.json    written once
  metrics.jsonl  tensorboard/
  starts.jsonl                               a line each time that workers begin or go on with a stage
  diverged.json                              only where training could not go on: when, and why
  left.json                                  only where the workers were told to leave, and saved
  leave                                      made by whoever wants that: `touch` does
  logs/rank-00003.log                        what the rank said; *.failed.json: why it ended, the last time
  stage-1/ …
    base.safetensors  base.json              what the stage starts from
    checkpoints/step-00001200/ …             inside the stage, each committed by its manifest
    model/                                   plain Hugging Face folder
    summary.json                             its presence is DONE
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mslt.errors import MsltError
from mslt.files import lock_alone, write_json, write_text
from mslt.plan import Plan, difference

KEPT = 2  # checkpoints of a stage
# What a run killed while it was being made can have left.
_BEFORE_THE_PLAN = ("recipe.yaml", ".recipe.yaml.tmp", "provenance.json", ".provenance.json.tmp", ".plan.json.tmp")
DOCTORS = ".mslt-doctor-"  # how its files begin, which try whether the directory can be written


@dataclass(frozen=True)
class StageDir:
    path: Path

    @property
    def base(self) -> Path:
        return self.path / "base.safetensors"

    @property
    def base_description(self) -> Path:
        return self.path / "base.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def is_done(self) -> bool:
        return self.summary.exists()


@dataclass(frozen=True)
class RunDir:
    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def starts(self) -> Path:
        return self.path / "starts.jsonl"

    @property
    def diverged(self) -> Path:
        return self.path / "diverged.json"

    @property
    def left(self) -> Path:
        return self.path / "left.json"

    @property
    def leave(self) -> Path:
        return self.path / "leave"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def was_left(self, port: int) -> bool:
        """Whether the workers that met at this port were told to leave, and saved."""
        try:
            return bool(json.loads(self.left.read_text())["port"] == port)
        except (OSError, ValueError, KeyError):
            return False

    def stage(self, stage_index: int) -> StageDir:
        """The directory of the stage; directories count from 1."""
        return StageDir(self.path / f"stage-{stage_index + 1}")

    def first_unfinished(self, plan: Plan) -> int | None:
        """Index of the first stage without its DONE marker, None when all have it."""
        return next((i for i in range(len(plan.stages)) if not self.stage(i).is_done()), None)


def holds_run(path: Path, plan: Plan) -> bool:
    """Whether the directory holds a run of this plan already.

    MsltError when it holds one of another plan (the message lists what differs) or something that is no run.
    """
    run = RunDir(path)
    if run.plan.exists():
        changes = difference(read_plan(run), plan)
        if changes:
            listed = "\n".join(f"  {line}" for line in changes)
            raise MsltError(
                f"{path}: holds a run of another plan:\n{listed}\n"
                "Take another --run-dir, or the recipe it was made with."
            )
        return True
    if path.exists() and (not path.is_dir() or any(not _may_be_left(entry.name) for entry in path.iterdir())):
        raise MsltError(f"{path}: is neither empty nor a run directory (it has no plan.json); take another --run-dir")
    return False


def _may_be_left(name: str) -> bool:
    return name in _BEFORE_THE_PLAN or name.startswith(DOCTORS)


def open_run(path: Path, plan: Plan, recipe_text: str, provenance: dict[str, Any]) -> RunDir:
    """Start a run directory, or go on with one of the same plan; MsltError as from `holds_run`."""
    run = RunDir(path)
    if not holds_run(path, plan):
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "recipe.yaml", recipe_text)
        write_json(path / "provenance.json", provenance)
        write_json(run.plan, plan.model_dump(mode="json"))  # last: it makes the directory a run
    return run


def find_model(path: Path) -> tuple[Path, tuple[RunDir, int] | None]:
    """The model folder that a path names, and of which run and stage index it is, None outside of a run. The path is a
    model folder, a stage's directory, or a run's, whose last finished stage counts. MsltError where none is finished.
    """
    where = path.resolve()
    if (where / "plan.json").is_file():
        run = RunDir(path)
        done = [index for index in range(len(read_plan(run).stages)) if run.stage(index).is_done()]
        if not done:
            raise MsltError(f"{path}: no stage of this run is finished; wait for the first, or run `mslt train` again")
        return run.stage(done[-1]).model, (run, done[-1])
    for stage in (where, where.parent):
        number = stage.name.removeprefix("stage-")
        if number.isdecimal() and stage.name != number and (stage.parent / "plan.json").is_file():
            run, index = RunDir(stage.parent), int(number) - 1
            if stage == where:
                if not run.stage(index).is_done():
                    raise MsltError(f"{path}: this stage is not finished; name one that has a summary.json")
                return path / "model", (run, index)
            return path, (run, index) if where == run.stage(index).model else None
    return path, None


def how_far(run: RunDir, plan: Plan) -> tuple[int, str]:
    """Grows with every stage and every checkpoint, whose folders are named by their step."""
    stage_index = run.first_unfinished(plan)
    if stage_index is None:
        return len(plan.stages), ""
    checkpoints = run.stage(stage_index).checkpoints
    return stage_index, max((path.parent.name for path in checkpoints.glob("*/manifest.json")), default="")


def evaluation_folder(checkpoint: str) -> Path:
    """Where what was found out about a model lies: beside its folder, which itself is copied and uploaded; of a name on
    the hub below the working folder."""
    folder = Path(checkpoint).resolve()
    return folder.with_name(f"{folder.name}-evaluation") if folder.is_dir() else Path("evaluation") / checkpoint


@contextmanager
def lock_run(run: RunDir) -> Iterator[None]:
    """Hold the run directory for this process; the system lets go when it ends, however it ends. MsltError when
    another process trains in it."""
    busy = f"{run.path}: another process is training in this run directory; wait for it, or end it"
    with lock_alone(run.path / ".lock", busy):
        yield


def read_plan(run: RunDir) -> Plan:
    """The plan a run directory holds. MsltError when there is none or it cannot be read."""
    try:
        return Plan.model_validate_json(run.plan.read_text())
    except OSError:
        raise MsltError(f"{run.path}: no run directory (it has no plan.json)") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise MsltError(
            f"{run.plan}: no plan this version of mslt can read ({where}: {first['msg']}); provenance.json beside it "
            "says which version made it"
        ) from None


def read_summaries(run: RunDir) -> list[dict[str, Any]]:
    """The summaries of all finished stages, in order."""
    plan = read_plan(run)
    stages = (run.stage(index) for index in range(len(plan.stages)))
    return [json.loads(stage.summary.read_text()) for stage in stages if stage.is_done()]
