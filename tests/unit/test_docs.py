"""Pages keep to the program: every command line parses, the schedule in them works, the API page is current.

tests/story runs the commands."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mslt.config import parse_recipe
from mslt.plan import sources_in_words
from mslt.schedule import make_plan
from tests.command_lines import fenced, lines_of_mslt, refuse_unknown_options

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_parse(page: Path) -> None:
    for line in lines_of_mslt(page):
        refuse_unknown_options(line)


def test_a_line_that_is_wrong_would_be_seen() -> None:
    with pytest.raises(Exception, match="no-such"):
        refuse_unknown_options("mslt report run --no-such-option")


def test_the_schedule_of_ones_own_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_sections: dict[str, Any]
) -> None:
    page = ROOT / "docs" / "own-schedule.md"
    (code,), (written,) = fenced(page, "python"), fenced(page, "yaml")
    (tmp_path / "my_schedules.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(code.splitlines()) <= 20
    sections = {**tiny_sections, **yaml.safe_load(written)}
    plan = make_plan(parse_recipe(sections, "recipe"), {})
    assert [sources_in_words(stage) for stage in plan.stages] == ["random", "0,0", "0-1,1", "0-2,2", "0-3"]
    assert [stage.steps for stage in plan.stages] == [225, 225, 225, 225, 300]
    assert plan.stages[2].trainable[0] == "layer.2"


def test_the_api_page_is_made_from_the_docstrings_as_they_are() -> None:
    path = ROOT / "docs" / "make_api.py"
    spec = importlib.util.spec_from_file_location("make_api", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["make_api"] = made
    spec.loader.exec_module(made)
    assert (ROOT / "docs" / "api.md").read_text() == made.reference(), "run `python docs/make_api.py`"
