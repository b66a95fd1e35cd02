"""A grid of fine-tunings on GLUE: run, summed up, and made a submission for GLUE's server."""

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mslt.errors import MsltError
from mslt.evaluate.glue import Cell, Source, cells_of, opened, run_cell, training_rows
from mslt.evaluate.glue_data import read_split
from mslt.evaluate.glue_submission import answer_tests, asked, write_submission
from mslt.evaluate.glue_tasks import PRESETS, TASKS, Preset, Task
from mslt.evaluate.grid import Job, run_jobs
from mslt.evaluate.mlm_probe import pretrained_head
from mslt.evaluate.opening import digest, grown_from, tokenizer_digest
from mslt.evaluate.result import refuse_other
from mslt.files import lock_alone, write_json
from mslt.provenance import provenance

Tell = Callable[[str], None]


def run_glue(
    source: Source,
    preset_name: str,
    preset: Preset,
    cells: Sequence[Cell],
    folder: Path,
    devices: Sequence[str],
    tell: Tell,
    save_models: bool = False,
    submission: Path | None = None,
) -> dict[str, Any]:
    """Do what is not done of a grid below `folder`, write results.json there, and return what is in it: these cells'
    tasks, and those that earlier grids in the folder came to.

    With `save_models`, or for a `submission`, the median run of each task's best setting is trained once more where its
    model was not kept. MsltError for data, checkpoint or folder that do not fit, before anything is trained.
    """
    tasks = {cell.task: TASKS[cell.task] for cell in cells}
    longest = max(cells, key=lambda cell: cell.max_tokens)
    tokenizer, _ = opened(source, tasks[longest.task], longest)  # its mistakes, now
    if source.objective is not None and source.objective.head == "pretrained":
        pretrained_head(source.checkpoint)
    if submission is not None:
        submission.parent.mkdir(parents=True, exist_ok=True)
    data = {name: _read_all(source, task, submission is not None) for name, task in tasks.items()}
    settings = {
        "preset": preset_name,
        "checkpoint": digest(source.checkpoint),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_train_rows": source.max_train_rows,
        "new_pooler": source.new_pooler,
        "objective": None if source.objective is None else asdict(source.objective),
    }
    _claim(folder, settings, {name: rows_sha256 for name, (_, rows_sha256) in data.items()}, cells)

    keeps = save_models or submission is not None
    alone = {name for name in tasks if sum(cell.task == name for cell in cells) == 1}
    costs = {name: num_rows for name, (num_rows, _) in data.items()}
    jobs = [_job(folder, "cells", source, cell, costs, keeps and cell.task in alone) for cell in cells]
    run_jobs(jobs, run_cell, devices, tell)
    with lock_alone(folder / ".lock", None):
        found = _merged(folder, summary(preset_name, preset, cells, folder), settings, grown_from(source.checkpoint))
        write_json(folder / "results.json", found)
    medians = [median_cell(cells, name, found["tasks"][name]) for name in tasks if found["tasks"][name]["best"]]
    if keeps:
        lacking = [cell for cell in medians if not _model(folder, cell).is_dir()]
        again = [_job(folder, "models", source, cell, costs) for cell in lacking]
        for job in again:
            job.forget()
        _refuse_failed(run_jobs(again, run_cell, devices, tell))
        for cell in lacking:
            _warn_of_another_score(folder, cell, tell)
    if submission is not None:
        tests = [_job(folder, "tests", source, cell, costs) for cell in medians]
        _refuse_failed(run_jobs(tests, answer_tests, devices, tell))
        answers = {name: each for job in tests for name, each in json.loads(job.path.read_text()).items()}
        with lock_alone(folder / ".lock", None):
            filled = write_submission(submission, answers)
        tell(f"{submission}: answers of {', '.join(answers)}")
        if filled:
            tell(f"{submission}: one label throughout, for GLUE's server wants them: {', '.join(filled)}")
    return found


def _path(folder: Path, kind: str, cell: Cell) -> Path:
    """What was found of a cell."""
    return folder / kind / f"{cell.name}.json"


def _model(folder: Path, cell: Cell) -> Path:
    return folder / "models" / cell.name


def _job(folder: Path, kind: str, source: Source, cell: Cell, costs: dict[str, int], with_model: bool = True) -> Job:
    cost = costs[cell.task] * cell.settings.num_epochs
    return Job(_path(folder, kind, cell), cost, (source, cell, _model(folder, cell) if with_model else None))


def _warn_of_another_score(folder: Path, cell: Cell, tell: Tell) -> None:
    again, before = (json.loads(_path(folder, kind, cell).read_text())["headline"] for kind in ("models", "cells"))
    if again != before:
        tell(f"warning: {cell.name}: {before:.4f}, and {again:.4f} when it was trained once more for its model")


def _read_all(source: Source, task: Task, with_tests: bool) -> tuple[int, str]:
    """Number of training rows, and a hash of what is trained and scored on. Every split that will be read is read, so
    that no mistake in the data is found hours later."""
    hashed = hashlib.sha256()
    rows = training_rows(source, task)
    for split in task.validation:
        hashed.update(repr(read_split(task, split, source.data_dir, source.is_subset)).encode())
    hashed.update(repr(rows).encode())
    for test in asked(task) if with_tests else ():
        for split in test.test:
            read_split(test, split, source.data_dir)
    return len(rows), hashed.hexdigest()


def _claim(folder: Path, settings: dict[str, Any], data: dict[str, str], cells: Sequence[Cell]) -> None:
    """Write down what the grid is of, one process after the other. MsltError where the folder holds another's."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "grid.json"
    with lock_alone(folder / ".lock", None):
        before = json.loads(file.read_text()) if file.exists() else {"settings": settings, "data": {}}
        refuse_other(file, before["settings"], settings)
        shared = before["data"].keys() & data.keys()
        refuse_other(file, {name: before["data"][name] for name in shared}, {name: data[name] for name in shared})
        for cell in cells:
            path = _path(folder, "cells", cell)
            if path.is_file():
                refuse_other(path, json.loads(path.read_text())["cell"], json.loads(json.dumps(asdict(cell))))
        if not file.exists() or data.keys() - before["data"].keys():
            described = {"settings": settings, "data": {**before["data"], **data}}
            write_json(file, {**described, "provenance": before.get("provenance", provenance())})


def _refuse_failed(jobs: Sequence[Job]) -> None:
    if jobs:
        raise MsltError(f"failed twice: {', '.join(job.name for job in jobs)}; {jobs[0].failure} says why. Nothing is "
                        "submitted; the same command tries them again")  # fmt: skip


def _merged(
    folder: Path, found: dict[str, Any], settings: dict[str, Any], grown: dict[str, Any] | None
) -> dict[str, Any]:
    """With the tasks of earlier grids in this folder."""
    file = folder / "results.json"
    tasks = {**(json.loads(file.read_text())["tasks"] if file.exists() else {}), **found["tasks"]}
    tasks = {name: tasks[name] for name in TASKS if name in tasks}
    whole = all(entry["best"] is not None and not entry["failed"] for entry in tasks.values())
    average = statistics.fmean(entry["median"] for entry in tasks.values()) if whole else None
    return {**found, "settings": settings, "grown": grown, "tasks": tasks, "average": average}


def summary(preset_name: str, preset: Preset, cells: Sequence[Cell], folder: Path) -> dict[str, Any]:
    """What a grid comes to, task by task: the runs of each setting, and the best setting by the median of its
    headlines; beside it the best single run. Cells without a result stand under `failed`, and their setting does not
    count. `protocol` is what was done, `differs` what of it is not the preset's."""
    tasks: dict[str, Any] = {}
    for task in dict.fromkeys(cell.task for cell in cells):
        own = [cell for cell in cells if cell.task == task]
        settings: dict[str, list[Cell]] = {}
        for cell in own:
            settings.setdefault(cell.setting, []).append(cell)
        failed = [cell.name for cell in own if not _path(folder, "cells", cell).is_file()]
        found = {
            name: _setting([json.loads(_path(folder, "cells", cell).read_text()) for cell in runs])
            for name, runs in settings.items()
            if not any(cell.name in failed for cell in runs)
        }
        best = max(found, key=lambda name: found[name]["median"], default=None)
        done = protocol(own)
        tasks[task] = {
            "headline": preset.headline(task),
            "protocol": done,
            "differs": differing(PRESETS[preset_name], task, done),
            "best": best,
            **({} if best is None else found[best]),
            "best_run": max((max(setting["headlines"]) for setting in found.values()), default=None),
            "settings": found,
            "failed": failed,
        }
    return {"preset": preset_name, "source": preset.source, "tasks": tasks}


def chosen_here(found: dict[str, Any]) -> str | None:
    """Says what was chosen by the scores that are shown; None where nothing was."""
    tasks = found["tasks"].values()
    several = any(len(entry["settings"]) > 1 for entry in tasks)
    epochs = any(entry["protocol"]["best_epoch"] for entry in tasks)
    what = ["the setting"] * several + ["the epoch of each run"] * epochs
    return f"Chosen by the scores that are shown: {', '.join(what)}." if what else None


def protocol(cells: Sequence[Cell]) -> dict[str, Any]:
    """What a task's cells have in common, and the values that they go through."""
    return {
        "learning_rates": sorted({cell.settings.learning_rate for cell in cells}),
        "batch_sizes": sorted({cell.settings.batch_size for cell in cells}),
        "num_epochs": cells[0].settings.num_epochs,
        "num_seeds": len({cell.settings.seed for cell in cells}),
        "max_tokens": cells[0].max_tokens,
        "best_epoch": cells[0].best_epoch,
        "warmup_share": cells[0].settings.warmup_share,
        "weight_decay": cells[0].settings.weight_decay,
        "precision": cells[0].settings.precision,
    }


def differing(preset: Preset, task: str, done: dict[str, Any]) -> list[str]:
    """What of a `protocol` is not the preset's."""
    meant = protocol(cells_of(preset, [task], range(preset.num_seeds), "fp32"))
    return [name for name in meant if done[name] != meant[name]]


def _setting(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    headlines = [result["headline"] for result in results]
    chosen = [result["epochs"][result["epoch"]] for result in results]
    return {
        "median": statistics.median(headlines),
        "mean": statistics.fmean(headlines),
        "deviation": statistics.stdev(headlines) if len(headlines) > 1 else None,
        "headlines": headlines,
        "scores": {
            split: {metric: [run[split][metric] for run in chosen] for metric in chosen[0][split]}
            for split in chosen[0]
        },
    }


def median_cell(cells: Sequence[Cell], task: str, found: dict[str, Any]) -> Cell:
    """The run whose headline is the median of the best setting's; of two the lower."""
    runs = [cell for cell in cells if cell.task == task and cell.setting == found["best"]]
    order = sorted(range(len(runs)), key=lambda index: found["headlines"][index])
    return runs[order[(len(runs) - 1) // 2]]
