"""GLUE's tables of runs: what is equal decides which of the paper's stands below."""

import json
import statistics
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mslt.cli.main import app
from mslt.errors import MsltError
from mslt.evaluate.glue import cells_of
from mslt.evaluate.glue_grid import protocol
from mslt.evaluate.glue_tasks import EIGHT, PRESETS
from mslt.evaluate.opening import digest
from mslt.files import write_json
from mslt.plan import Plan
from mslt.report import paper
from mslt.report.glue import read_scores, score_tables
from mslt.rundir import RunDir, evaluation_folder
from tests.finished import write_finished


def scored(
    path: Path,
    plan: Plan,
    step_s: float,
    headlines: dict[str, list[float]],
    test: dict[str, float] | None = None,
    failed: list[str] | None = None,
    preset: str = "mslt",
):
    write_finished(path, plan, lambda step: 5.0, [step_s] * len(plan.stages))
    model = RunDir(path).stage(len(plan.stages) - 1).model
    model.mkdir()
    folder = evaluation_folder(str(model)) / f"glue-{preset}"
    folder.mkdir(parents=True)
    named = PRESETS[preset]
    tasks = {
        task: {
            "headline": named.headline(task),
            "protocol": protocol(cells_of(named, [task], range(named.num_seeds), "fp32")),
            "best": "rate=5e-05_batch=32",
            "headlines": values,
            "median": statistics.median(values),
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
        }
        for task, values in headlines.items()
    }
    done = {"differs": [], "failed": failed or []}
    write_json(
        folder / "results.json",
        {
            "settings": {"checkpoint": digest(str(model)), "max_train_rows": None},
            "tasks": {task: {**entry, **done} for task, entry in tasks.items()},
        },
    )
    if test is not None:
        write_json(folder / "test-scores.json", test)
    return path


def test_equal_steps_equal_time_and_test(tmp_path, tiny_plan):
    ours = scored(tmp_path / "a", tiny_plan, 1.0, {"SST-2": [0.9, 0.8, 0.82], "MRPC": [0.75]}, {"SST-2": 93.0})
    other = scored(tmp_path / "b", tiny_plan, 2.0, {"SST-2": [0.5, 0.6, 0.7]}, {"SST-2": 92.0})
    validation, test = score_tables([read_scores(path, "mslt") for path in (ours, other)])
    assert validation.title == "GLUE, validation, at equal steps (Table 2)"
    assert validation.tasks == ["SST-2", "MRPC", "average"]
    first, second = validation.ours
    assert (first.steps, first.hours) == ("60", "0.02")
    assert first.scores == {"SST-2": "82.0 (84.0 ± 5.3)", "MRPC": "75.0", "average": "82.0"}, (
        "the average of what both have"
    )
    assert second.scores["average"] == "60.0"
    assert validation.reported[0].scores["average"] == "92.2"
    assert test.title == "GLUE, test (Table 4)"
    assert test.ours[0].scores["SST-2"] == "93.0"

    printed = CliRunner().invoke(app, ["compare", str(ours), str(other), "--glue", "mslt"])
    assert printed.exit_code == 0, printed.output
    for text in ("equal steps (Table 2)", "82.0 (84.0 ± 5.3)", "Base, in stages (Yang et al.)", "test (Table 4)"):
        assert text in printed.output
    as_json = CliRunner().invoke(app, ["compare", str(ours), str(other), "--glue", "mslt", "--json"])
    assert json.loads(as_json.stdout)["glue"][0]["validation"]["SST-2"]["median"] == pytest.approx(82.0)


def test_another_preset_does_not_stand_beside_the_paper_unsaid(tmp_path, tiny_plan):
    run = scored(tmp_path / "a", tiny_plan, 1.0, {"SST-2": [0.9], "STS-B": [0.8]}, preset="convexity")
    read = read_scores(run, "convexity")
    assert "num_seeds" in read.differs["SST-2"]
    assert read.differs["STS-B"][0] == f"{PRESETS['convexity'].headline('STS-B')} as the metric"
    (table,) = score_tables([read])
    assert "SST-2" in table.reported[0].scores
    assert "STS-B" not in table.reported[0].scores, "of another metric"
    misspelt = CliRunner().invoke(app, ["compare", str(run), "--glue", "convex"])
    assert "did you mean convexity?" in str(misspelt.exception)


def test_equal_time_where_steps_differ(tmp_path, tiny_plan, tiny_recipe):
    short = tiny_plan.model_copy(update={"stages": tiny_plan.stages[:2]})
    a = scored(tmp_path / "a", tiny_plan, 1.0, {"SST-2": [0.9]})
    b = scored(tmp_path / "b", short, 1.5, {"SST-2": [0.8]})
    (table,) = score_tables([read_scores(path, "mslt") for path in (a, b)])
    assert table.title == "GLUE, validation, at equal time (Table 3)"
    assert (table.reported[1].name, table.reported[1].steps, table.reported[1].hours) == ("Base, full", "480,000", "41")
    c = scored(tmp_path / "c", short, 3.0, {"SST-2": [0.8]})
    (table,) = score_tables([read_scores(path, "mslt") for path in (a, c)])
    assert "neither steps nor time are equal" in table.title


def test_a_run_without_results_is_named_with_the_command(tmp_path, tiny_plan):
    path = write_finished(tmp_path / "run", tiny_plan, lambda step: 5.0, [1.0] * 3)
    with pytest.raises(MsltError, match=r"no results of GLUE; run `mslt evaluate glue .*stage-3/model --preset mslt`"):
        read_scores(path, "mslt")


def test_reported_averages_are_those_of_the_figures():
    for row in (*paper.EQUAL_STEPS, *paper.EQUAL_TIME, *paper.TEST):
        scores = [score for task, score in row.scores.items() if task != "average"]
        assert statistics.fmean(scores) == pytest.approx(row.scores["average"], abs=0.051), row.name


def test_what_cannot_stand_side_by_side_is_refused(tmp_path, tiny_plan):
    a = scored(tmp_path / "a", tiny_plan, 1.0, {"SST-2": [0.9]})
    failed = scored(tmp_path / "b", tiny_plan, 1.0, {"SST-2": [0.9]}, failed=["SST-2/seed-3"])
    with pytest.raises(MsltError, match=r"fine-tunings failed \(SST-2/seed-3\)"):
        read_scores(failed, "mslt")
    other = scored(tmp_path / "c", tiny_plan, 1.0, {"SST-2": [0.9]})
    file = next(other.rglob("results.json"))
    file.write_text(file.read_text().replace('"num_epochs": 3', '"num_epochs": 2'))
    with pytest.raises(MsltError, match=r"fine-tuned otherwise than .* \(SST-2\)"):
        score_tables([read_scores(path, "mslt") for path in (a, other)])
    (a / "stage-3" / "model" / "config.json").write_text("{}")
    with pytest.raises(MsltError, match="of other weights"):
        read_scores(a, "mslt")


def test_averages_are_over_what_the_papers_table_has_too(tmp_path, tiny_plan):
    tasks = {task: [0.5] for task in EIGHT}
    short = tiny_plan.model_copy(update={"stages": tiny_plan.stages[:2]})
    a = scored(tmp_path / "a", tiny_plan, 1.0, {**tasks, "CoLA": [0.9]})
    b = scored(tmp_path / "b", short, 1.5, tasks)
    (table,) = score_tables([read_scores(path, "mslt") for path in (a, b)])
    assert table.ours[0].scores["average"] == "50.0", "without CoLA and QQP"
    assert [row.scores["average"] for row in table.reported] == ["86.3", "85.4", "86.8", "85.4"]


@pytest.mark.parametrize("text", ["{", '{"SST-2": "93"}', '{"SST-2": 0.93}', '{"SST2": 93.0}', "[93.0]"])
def test_scores_of_the_server_that_cannot_be(tmp_path, tiny_plan, text):
    run = scored(tmp_path / "a", tiny_plan, 1.0, {"SST-2": [0.9]}, {})
    next(run.rglob("test-scores.json")).write_text(text)
    with pytest.raises(MsltError, match=r"test-scores\.json"):
        read_scores(run, "mslt")


def test_the_server_gives_0_to_one_answer_throughout(tmp_path, tiny_plan):
    run = scored(tmp_path / "a", tiny_plan, 1.0, {"SST-2": [0.9]}, {"CoLA": 0.0, "STS-B": -2.5})
    assert read_scores(run, "mslt").test == {"CoLA": 0.0, "STS-B": -2.5}
