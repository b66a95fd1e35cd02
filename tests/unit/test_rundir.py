"""A run directory is begun once, and goes on with its own plan only."""

import json
from pathlib import Path
from typing import Any

import pytest

from mslt.config import load_recipe, parse_recipe
from mslt.engine.ds_config import read_engine_config
from mslt.errors import MsltError
from mslt.files import write_json
from mslt.plan import Plan
from mslt.rundir import RunDir, open_run, read_plan, read_summaries
from mslt.schedule import make_plan


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("exists", [False, True])
def test_new_run_holds_recipe_plan_and_provenance(tmp_path: Path, tiny_plan: Plan, exists: bool) -> None:
    path = tmp_path / "deep" / "run"
    if exists:
        path.mkdir(parents=True)
    run = open_run(path, tiny_plan, "model: {}\n", {"command": "mslt train"})
    assert sorted(contents(path)) == ["plan.json", "provenance.json", "recipe.yaml"]
    assert read_plan(run) == tiny_plan
    assert (path / "recipe.yaml").read_text() == "model: {}\n"
    assert json.loads((path / "provenance.json").read_text()) == {"command": "mslt train"}


def test_same_plan_goes_on_and_rewrites_nothing(tmp_path: Path, tiny_plan: Plan) -> None:
    open_run(tmp_path / "run", tiny_plan, "first", {"command": "first"})
    before = contents(tmp_path / "run")
    assert open_run(tmp_path / "run", tiny_plan, "second", {"command": "second"}) == RunDir(tmp_path / "run")
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["bert-base", "bert-large", "quickstart", "quickstart-full"])
def test_shipped_plans_go_on_from_their_files(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        recipe = load_recipe(name)
        open_run(tmp_path, make_plan(recipe, read_engine_config(recipe.engine), "0" * 64), "", {})


def test_another_plan_is_refused_with_what_differs(tmp_path: Path, tiny_plan: Plan) -> None:
    open_run(tmp_path / "run", tiny_plan, "", {})
    before = contents(tmp_path / "run")
    other = tiny_plan.model_copy(update={"clip_norm": 0.5, "shards_sha256": "b" * 64})
    with pytest.raises(MsltError) as caught:
        open_run(tmp_path / "run", other, "", {})
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path / 'run'}: holds a run of another plan:"
    assert lines[1:3] == [f"  shards_sha256: None → {'b' * 64}", "  clip_norm: 1.0 → 0.5"]
    assert "--run-dir" in lines[3]
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("section", "change", "lines"),
    [
        ("schedule", {"optimizer_state": "carry"}, ["stages.2.optimizer_state: reset → carry",
                                                    "stages.3.optimizer_state: reset → carry"]),
        ("optimizer", {"name": "adamw"}, ["optimizer.name: lamb → adamw"]),
        ("optimizer", {"trust_ratio_bounds": [0.01, 10]}, ["optimizer.trust_ratio_bounds: None → [0.01, 10.0]"]),
    ],
)  # fmt: skip
def test_another_optimizer_is_another_plan_and_the_same_goes_on(
    tmp_path: Path, tiny_recipe: dict[str, Any], section: str, change: dict[str, Any], lines: list[str]
) -> None:
    before = make_plan(parse_recipe(tiny_recipe, "r"), {})
    tiny_recipe[section] |= change
    after = make_plan(parse_recipe(tiny_recipe, "r"), {})
    for first, second in ((before, after), (after, before)):
        run = tmp_path / first.digest()
        assert read_plan(open_run(run, first, "", {})) == first
        open_run(run, first, "", {})
        with pytest.raises(MsltError, match="holds a run of another plan") as caught:
            open_run(run, second, "", {})
        if first is before:
            assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == lines


def test_a_plan_from_before_stages_had_an_optimizer_state_is_named(tmp_path: Path, tiny_plan: Plan) -> None:
    run = open_run(tmp_path / "run", tiny_plan, "", {})
    for missing in ("skip_bad_batches", "optimizer_state"):
        held = tiny_plan.model_dump(mode="json")
        held.pop(missing, None)
        for stage in held["stages"]:
            stage.pop(missing, None)
        run.plan.write_text(json.dumps(held))
        with pytest.raises(MsltError, match=rf"plan.json: no plan this version of mslt can read(.|\n)*{missing}"):
            open_run(tmp_path / "run", tiny_plan, "", {})


def test_moved_shards_are_no_other_plan(tmp_path: Path, tiny_plan: Plan) -> None:
    open_run(tmp_path, tiny_plan, "", {})
    open_run(tmp_path, tiny_plan.model_copy(update={"data": tiny_plan.data.model_copy(update={"shards": "b"})}), "", {})


def test_what_is_no_run_is_refused_and_kept(tmp_path: Path, tiny_plan: Plan) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("foreign", "file"):
        with pytest.raises(MsltError, match=f"{name}: is neither empty nor a run directory .*--run-dir"):
            open_run(tmp_path / name, tiny_plan, "", {})
    assert contents(tmp_path) == {"foreign/thesis.txt": b"mine", "file": b"mine"}


def test_a_plan_that_cannot_be_read_is_named(tmp_path: Path, tiny_plan: Plan) -> None:
    with pytest.raises(MsltError, match=r"nowhere: no run directory \(it has no plan.json\)"):
        read_plan(RunDir(tmp_path / "nowhere"))
    run = open_run(tmp_path / "run", tiny_plan, "", {})
    for text in ("{", "{}", json.dumps({**tiny_plan.model_dump(mode="json"), "colour": "red"})):
        run.plan.write_text(text)
        with pytest.raises(MsltError, match=r"plan.json: no plan this version of mslt can read"):
            read_plan(run)


def test_a_stage_is_done_by_its_summary_alone(tmp_path: Path, tiny_plan: Plan) -> None:
    run = open_run(tmp_path / "run", tiny_plan, "", {})
    assert [run.stage(index).path.name for index in range(3)] == ["stage-1", "stage-2", "stage-3"]
    for index in range(3):
        assert run.first_unfinished(tiny_plan) == index
        run.stage(index).model.mkdir(parents=True)
        assert run.first_unfinished(tiny_plan) == index
        write_json(run.stage(index).summary, {"stage": index + 1})
        assert [summary["stage"] for summary in read_summaries(run)] == list(range(1, index + 2))
    assert run.first_unfinished(tiny_plan) is None


def test_a_run_killed_while_it_was_being_made_is_made_again(tmp_path: Path, tiny_plan: Plan) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("half")
    (run / ".plan.json.tmp").write_text("{")
    opened = open_run(run, tiny_plan, "whole", {})
    assert (run / "recipe.yaml").read_text() == "whole"
    assert read_plan(opened) == tiny_plan
