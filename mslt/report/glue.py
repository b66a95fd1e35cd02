"""GLUE scores of runs side by side, as in Tables 2, 3 and 4 of Yang et al. 2020 (arXiv:2011.13635), theirs below."""

import json
import statistics
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from mslt.errors import MsltError
from mslt.evaluate.glue_grid import differing
from mslt.evaluate.glue_tasks import PRESETS, TASKS
from mslt.evaluate.opening import digest
from mslt.report import paper
from mslt.rundir import RunDir, evaluation_folder, read_plan, read_summaries

PAPERS = PRESETS["mslt"]
SAME_TIME = 0.05  # of the longer run's: the paper's times are that near each other


@dataclass(frozen=True)
class Score:
    """A score in percent: the median over seeds of the best setting, and the mean and deviation of those runs."""

    median: float
    mean: float
    deviation: float | None
    num_runs: int

    def __str__(self) -> str:
        if self.num_runs == 1:
            return f"{self.median:.1f}"
        spread = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{self.median:.1f} ({self.mean:.1f}{spread})"


@dataclass(frozen=True)
class RunScores:
    """`protocol` is what was done, by task; `differs` what of it is not the paper's; `metrics` are those of the
    scores."""

    run: str
    steps: int
    hours: float
    protocol: dict[str, Any]
    differs: dict[str, list[str]]
    metrics: dict[str, str]
    validation: dict[str, Score]
    test: dict[str, float]


@dataclass(frozen=True)
class ScoreRow:
    """As it is printed; `scores` by task."""

    name: str
    steps: str
    hours: str
    scores: dict[str, str]


@dataclass(frozen=True)
class ScoreTable:
    """`tasks` are the columns; rows are ours and the paper's."""

    title: str
    tasks: list[str]
    ours: list[ScoreRow]
    reported: list[ScoreRow]


def read_scores(run: Path, preset: str) -> RunScores:
    """What `mslt evaluate glue` found of a run's last stage. MsltError where it has not been run, or not to its end."""
    directory = RunDir(run)
    plan = read_plan(directory)
    if directory.first_unfinished(plan) is not None:
        raise MsltError(f"{run}: is not finished; finish it with `mslt train`")
    model = directory.stage(len(plan.stages) - 1).model
    folder = evaluation_folder(str(model)) / f"glue-{preset}"
    command = f"`mslt evaluate glue {model} --preset {preset}`"
    try:
        found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    except OSError:
        raise MsltError(f"{folder}: no results of GLUE; run {command} first") from None
    failed = [name for entry in found["tasks"].values() for name in entry["failed"]]
    if failed:
        raise MsltError(f"{folder}: fine-tunings failed ({', '.join(failed)}); {command} tries them again")
    if found["settings"]["checkpoint"] != digest(str(model)):
        raise MsltError(
            f"{folder}: the results are of other weights than {model} holds; remove them, and run {command}"
        )
    summaries = read_summaries(directory)
    return RunScores(
        run=str(run),
        steps=sum(summary["steps"] for summary in summaries),
        hours=sum(summary["spent_s"]["train"] for summary in summaries) / 3600,
        protocol={
            "max_train_rows": found["settings"]["max_train_rows"],
            **{task: entry["protocol"] for task, entry in found["tasks"].items()},
        },
        differs={task: apart for task, entry in found["tasks"].items() if (apart := _not_the_papers(task, entry))},
        metrics={task: entry["headline"] for task, entry in found["tasks"].items()},
        validation={task: _score(entry) for task, entry in found["tasks"].items()},
        test=_test_scores(folder / "test-scores.json"),
    )


def _not_the_papers(task: str, entry: dict[str, Any]) -> list[str]:
    metric = [] if entry["headline"] == PAPERS.headline(task) else [f"{entry['headline']} as the metric"]
    return [*metric, *differing(PAPERS, task, entry["protocol"])]


def _test_scores(path: Path) -> dict[str, float]:
    """What the user wrote down of the server's answers."""
    if not path.is_file():
        return {}
    try:
        scores = json.loads(path.read_text())
        wrong = [f"{task}: {score}" for task, score in scores.items()
                 if task not in TASKS or not -100 <= score <= 100 or 0 < abs(score) < 1]  # fmt: skip
    except (ValueError, TypeError, AttributeError) as error:
        raise MsltError(f'{path}: not readable ({error}); write it like {{"SST-2": 93.0, "RTE": 66.4}}') from None
    if wrong:
        raise MsltError(f"{path}: {', '.join(wrong)}: give percent of {', '.join(TASKS)}")
    return scores


def _score(entry: dict[str, Any]) -> Score:
    deviation = entry["deviation"]
    return Score(
        100 * entry["median"],
        100 * entry["mean"],
        None if deviation is None else 100 * deviation,
        len(entry["headlines"]),
    )


def score_tables(runs: list[RunScores]) -> list[ScoreTable]:
    """The validation scores beside the paper's table for what is equal between the runs, steps or time; and where the
    server's answers lie beside every run's, the test scores. The paper's score is left out where ours is another
    metric; averages are over what all rows have. MsltError for runs that were fine-tuned in other ways."""
    for run in runs[1:]:
        unlike = [name for name in run.protocol.keys() & runs[0].protocol.keys()
                  if run.protocol[name] != runs[0].protocol[name]]  # fmt: skip
        if unlike:
            raise MsltError(f"{run.run}: fine-tuned otherwise than {runs[0].run} ({', '.join(sorted(unlike))}); run "
                            "`mslt evaluate glue` with the same options on both")  # fmt: skip
    same_steps = len({run.steps for run in runs}) == 1
    same_time = all(abs(a.hours - b.hours) <= SAME_TIME * max(a.hours, b.hours) for a, b in combinations(runs, 2))
    if same_steps:
        title, reported = "GLUE, validation, at equal steps (Table 2)", paper.EQUAL_STEPS
    elif same_time:
        title, reported = "GLUE, validation, at equal time (Table 3)", paper.EQUAL_TIME
    else:
        title, reported = "GLUE, validation; neither steps nor time are equal", paper.EQUAL_STEPS
    other = {task for run in runs for task, metric in run.metrics.items() if metric != PAPERS.headline(task)}
    comparable = tuple(
        replace(row, scores={task: score for task, score in row.scores.items() if task not in other})
        for row in reported
    )
    tables = [_table(title, runs, [dict(run.validation) for run in runs], comparable)]
    if all(run.test for run in runs):
        tables.append(_table("GLUE, test (Table 4)", runs, [dict(run.test) for run in runs], paper.TEST))
    return tables


def _table(
    title: str, runs: list[RunScores], found: list[dict[str, Any]], reported: tuple[paper.Reported, ...]
) -> ScoreTable:
    order = [task for task in paper.EQUAL_STEPS[0].scores if task != "average"]
    tasks = [task for task in order if any(task in scores for scores in found)]
    shared = [task for task in tasks if all(task in scores for scores in [*found, *(row.scores for row in reported)])]
    ours = []
    for run, scores in zip(runs, found, strict=True):
        written = {task: str(score) if isinstance(score, Score) else f"{score:.1f}" for task, score in scores.items()}
        values = {task: score.median if isinstance(score, Score) else score for task, score in scores.items()}
        written["average"] = _average(values, shared)
        ours.append(ScoreRow(run.run, f"{run.steps:,}", f"{run.hours:.2f}", written))
    theirs = [
        ScoreRow(
            row.name,
            f"{row.steps:,}",
            "–" if row.hours is None else f"{row.hours:g}",
            {**{task: f"{score:.1f}" for task, score in row.scores.items()}, "average": _average(row.scores, shared)},
        )
        for row in reported
    ]
    return ScoreTable(title, [*tasks, "average"], ours, theirs)


def _average(scores: dict[str, float], tasks: list[str]) -> str:
    return f"{statistics.fmean(scores[task] for task in tasks):.1f}" if tasks and scores.keys() >= set(tasks) else "–"
