"""The page about runs: opens alone, shows what the runs' files say, and draws itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import vl_convert
from matplotlib import pyplot

from mslt import metrics
from mslt.config import parse_recipe
from mslt.cost import StepCosts, operations, scaled, step_parts
from mslt.errors import MsltError
from mslt.files import write_json
from mslt.plan import Plan
from mslt.report import page
from mslt.report.charts import predicted, thinned
from mslt.report.heatmap import HeatMap, draw_heatmaps, write_heatmaps_csv
from mslt.report.page import outcome_table, read_runs, write_report
from mslt.rundir import RunDir, evaluation_folder, read_plan
from mslt.schedule import make_plan
from tests.finished import unfinish, write_finished


def plan_of(sections: dict[str, Any], **schedule: Any) -> Plan:
    return make_plan(parse_recipe({**sections, "schedule": {"steps": 60, **schedule}}, "recipe"), {})


@pytest.fixture
def runs(tmp_path: Path, tiny_sections: dict[str, Any]) -> list[Path]:
    """A full run and a grown one, which went on after a stop at step 30."""
    full, grown = plan_of(tiny_sections, name="full"), plan_of(tiny_sections, name="mslt", k=2)
    paths = [
        write_finished(tmp_path / "full", full, lambda step: 9 - step / 20, [0.5]),
        write_finished(tmp_path / "grown", grown, lambda step: 9 - step / 25, [0.2, 0.3, 0.5]),
    ]
    for step, again in ((0, 0), (30, 7)):
        start = {"stage": 1, "step": step, "steps_again": again, "workers": 2, "time": "2026-01-01T00:00:00+00:00",
                 "hardware": "NVIDIA H200", "commit": None, "mslt": "0"}  # fmt: skip
        metrics.append(RunDir(paths[1]).starts, start)
    return paths


@pytest.fixture(autouse=True)
def _no_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundling it takes seconds; one test looks at the page with it."""
    if request.function is not test_page_opens_alone_and_is_small:
        monkeypatch.setattr(vl_convert, "javascript_bundle", lambda snippet: "")


def specs_of(html: str) -> list[dict[str, Any]]:
    """The charts, in the order of the page."""
    listed = html[html.index("const charts = [") : html.index("charts.forEach")]
    return [json.loads(line.removeprefix("const charts = [").removesuffix(",")) for line in listed.splitlines()[:-1]]


def values(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of a chart's layers."""
    return [row for part in spec.get("layer", [spec]) for row in part.get("data", spec.get("data", {}))["values"]]


def test_page_opens_alone_and_is_small(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    assert write_report(runs, out) == out.stat().st_size < page.MOST_BYTES
    html = out.read_text()
    outside_scripts = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert not re.search(r"<link|<script|@import|url\(|https?://", outside_scripts)
    assert "<script src" not in html
    for title in ("Outcome", "Plan", "Loss", "Where the time goes", "Rates", "Starts", "Provenance"):
        assert f">{title}</h2>" in html
    assert ">Evaluation</h2>" not in html, "there was none"


def test_every_chart_draws_what_the_runs_logged(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, tmp_path / "report.html")
    specs = specs_of((tmp_path / "report.html").read_text())
    assert len(specs) == 6, "two plans, losses over steps and hours, time, rates"
    for spec in specs:
        assert vl_convert.vegalite_to_svg({**spec, "width": 600}).startswith("<svg")
    over_steps = values(specs[2])
    logged = {
        (path.name, record["step"], record["mlm_loss"])
        for path in runs
        for record in metrics.read(RunDir(path).metrics)
    }
    assert {(row["run"], row["x"], row["loss"]) for row in over_steps if "loss" in row} == logged
    bands = {(row["run"], row["start"], row["end"]) for row in over_steps if "start" in row}
    first, second = (read_plan(RunDir(runs[1])).first_step(index) for index in (1, 2))
    assert bands == {("full", 0, 60), ("grown", 0, first), ("grown", first, second), ("grown", second, 60)}
    assert [(row["x"], row["steps_again"]) for row in over_steps if "steps_again" in row] == [(30, 7)]
    minutes = {row["x"] for row in values(specs[3]) if row.get("run") == "grown" and "end" not in row}
    assert max(minutes) == pytest.approx((first * 0.2 + (second - first) * 0.3 + (60 - second) * 0.5) / 60)


def test_plan_says_what_trains_and_where_layers_come_from(runs: list[Path], tmp_path: Path) -> None:
    write_report([runs[1]], tmp_path / "report.html")
    cells = {(row["stage"], row["part"]): row for row in values(specs_of((tmp_path / "report.html").read_text())[0])}
    assert cells["stage 2", "layer 2"]["source"] == "copy of 0"
    assert cells["stage 2", "layer 0"]["source"] == "kept"
    assert [cells["stage 2", f"layer {index}"]["state"] for index in range(4)] == ["frozen"] * 2 + ["trains"] * 2
    assert cells["stage 1", "layer 0"]["source"] == "new"


def test_a_run_under_way_is_told_as_far_as_it_is(runs: list[Path], tmp_path: Path) -> None:
    unfinish(runs[1], 2)
    write_report(runs, tmp_path / "report.html")
    assert "stage 3 of 3" in (tmp_path / "report.html").read_text()
    full, grown = outcome_table(read_runs(runs)).rows
    assert (full[7], grown[7]) == ("1.00×", "–"), "its last stage, the costly one, is to come"


def test_evaluations_and_pictures_are_shown_as_far_as_there_is_room(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RunDir(runs[0]).stage(0).model
    model.mkdir()
    folder = evaluation_folder(str(model))
    (folder / "glue-quick").mkdir(parents=True)
    scored = {"best": "rate=1", "median": 0.875, "headlines": [0.9, 0.875, 0.8]}
    write_json(folder / "glue-quick" / "results.json", {"tasks": {"SST-2": scored, "RTE": {"best": None}}})
    pyplot.figure(figsize=(1, 1)).savefig(folder / "map.png")
    pyplot.close("all")
    write_report(runs, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<td>87.5% (3)</td>" in html
    assert "<td>failed</td>" in html
    assert html.count("data:image/png;base64") == 1
    monkeypatch.setattr(page, "MOST_BYTES", page.BESIDE_PICTURES)
    write_report(runs, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "data:image/png" not in html
    assert "map.png: left out, the page is full" in html


def test_a_heat_map_with_its_numbers_is_drawn_as_a_chart(runs: list[Path], tmp_path: Path) -> None:
    model = RunDir(runs[0]).stage(0).model
    model.mkdir()
    folder = evaluation_folder(str(model)) / "probes"
    maps = [
        HeatMap("accuracy, %", ["length", "depth"], ["emb", "0"], [[90.0, 50.0], [20.0, float("nan")]]),
        HeatMap("tuned − not, points", ["length"], ["emb"], [[-3.5]]),
    ]
    draw_heatmaps(maps, folder / "heatmap.png")
    write_heatmaps_csv(maps, folder / "heatmap.csv")
    write_report(runs, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "data:image/png" not in html
    assert "probes/heatmap: accuracy, %</h3>" in html
    accuracy, difference = specs_of(html)[-2:]
    assert {(row["row"], row["column"], row["value"]) for row in values(accuracy)} == {
        ("length", "emb", 90.0), ("length", "0", 50.0), ("depth", "emb", 20.0),
    }  # fmt: skip
    scales = [spec["layer"][0]["encoding"]["color"]["scale"] for spec in (accuracy, difference)]
    assert "domain" not in scales[0]
    assert scales[1]["domain"] == [-3.5, 0, 3.5]
    for spec in (accuracy, difference):
        assert vl_convert.vegalite_to_svg({**spec, "width": 600}).startswith("<svg")


def test_foretold_time_is_that_of_a_run_which_keeps_to_operations(runs: list[Path]) -> None:
    (grown,) = read_runs([runs[1]])
    rate = {"forward": 2e-12, "backward": 3e-12, "reduce": 1e-9, "optimizer": 2e-9, "data": 0.01}
    for summary in grown.summaries:
        stage = grown.plan.stages[summary["stage"] - 1]
        work = scaled(operations(grown.plan.model, 32, grown.plan.data.max_predictions), stage.batch_size)
        costs = {
            name: value * rate["backward" if "backward" in name else "forward"] for name, value in vars(work).items()
        }
        costs |= {"reduce_parameter": 1e-9, "optimizer_parameter": 2e-9, "data": 0.01, "num_loaders": 0}
        parts = step_parts(StepCosts(**costs), grown.plan.model, stage)
        summary["spent_s"] = {part: value * summary["steps"] for part, value in parts.items()}
        summary["spent_s"]["train"] = sum(parts.values()) * summary["steps"]
    foretold = predicted(grown)
    assert foretold.keys() == {0, 1}, "the stage that trains everything is what they are foretold from"
    for index, parts in foretold.items():
        summary = grown.summaries[index]
        for part, seconds in parts.items():
            assert seconds == pytest.approx(summary["spent_s"][part] / summary["steps"], rel=1e-9), part


def test_names_are_text_not_markup(runs: list[Path], tmp_path: Path) -> None:
    odd = runs[0].rename(tmp_path / "<b>bold & co<!--")
    write_report([odd], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<b>bold" not in html
    assert "&lt;b&gt;bold &amp; co" in html
    assert specs_of(html), "no script ends early"


def test_thinned_curves_keep_their_ends() -> None:
    records = [{"step": step} for step in range(10_000)]
    kept = thinned(records)
    assert 1000 < len(kept) <= 1500
    assert kept[-1] == records[-1]
    assert thinned(records[:7]) == records[:7]


def test_what_is_no_run_is_refused_and_nothing_written(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(MsltError, match=r"no run directory"):
        write_report([tmp_path / "none"], out)
    with pytest.raises(MsltError, match=r"stands there twice"):
        write_report([runs[0], runs[0]], out)
    RunDir(runs[0]).metrics.unlink()
    with pytest.raises(MsltError, match=r"nothing has been logged yet"):
        write_report(runs, out)
    assert not out.exists()
