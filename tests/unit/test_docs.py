"""Pages keep to the program: every command line parses, every link leads somewhere, recipes and the schedule in them
work, what is made from docstrings is current.

tests/story runs the commands."""

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from mslt.config import Recipe, ScheduleConfig, load_recipe
from mslt.growth import SCHEDULES
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_tables_header_has_as_many_cells_as_the_line_below_it(page: Path) -> None:
    """Another number, and it is shown as text."""
    lines = page.read_text().splitlines()
    for header, line in pairwise(lines):
        if re.fullmatch(r"\|( *:?-+:? *\|)+", line):
            assert len(re.findall(r"(?<!\\)\|", header)) == line.count("|"), header


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["recipe", "cluster"])
def test_recipes_are_right(name: str, tmp_path: Path) -> None:
    (written,) = fenced(ROOT / "docs" / f"{name}.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(written)
    assert load_recipe(str(tmp_path / "recipe.yaml")).schedule.name == "mslt"


def test_the_schedule_of_ones_own_is_one(tmp_path: Path) -> None:
    page = ROOT / "docs" / "own-schedule.md"
    (code,), (written,), (command,) = (fenced(page, language) for language in ("python", "yaml", "bash"))
    assert len(code.splitlines()) <= 20
    (tmp_path / "my_schedules.py").write_text(code)
    (tmp_path / "one-by-one.yaml").write_text(written)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)

    def run(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    done = run(f"{command.rstrip()} --json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    sources = [stage["sources"] for stage in plan["stages"]]
    assert sources[:3] == [["random"], [0, 0], [0, 1, 1]]
    assert sources[-1] == list(range(12))
    assert [stage["steps"] for stage in plan["stages"]] == [62_500] * 12 + [250_000]
    assert plan["stages"][2]["trainable"][0] == "layer.2"
    assert "my_schedules" in run(command.split(maxsplit=1)[1]).stderr, "Python finds it without what the page says"


def made_pages() -> ModuleType:
    path = ROOT / "docs" / "make_api.py"
    spec = importlib.util.spec_from_file_location("make_api", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["make_api"] = made
    spec.loader.exec_module(made)
    return made


def test_the_api_page_is_made_from_the_docstrings_as_they_are() -> None:
    assert (ROOT / "docs" / "api.md").read_text() == made_pages().reference(), "run `python docs/make_api.py`"


def test_the_recipe_page_has_the_keys_as_they_are() -> None:
    made, page = made_pages(), (ROOT / "docs" / "recipe.md").read_text()
    assert page == made.with_keys(page), "run `python docs/make_api.py`"
    for section in Recipe.model_fields.values():
        for name, field in getattr(section.annotation, "model_fields", {}).items():
            assert field.description, f"{name}: mslt/config.py does not say what it means"


def test_every_option_of_a_schedule_stands_on_the_page() -> None:
    page = (ROOT / "docs" / "schedules.md").read_text()
    options = [name for schedule in SCHEDULES.values() for name in list(inspect.signature(schedule).parameters)[2:]]
    for name in [*options, *(name for name in ScheduleConfig.model_fields if name not in ("name", "steps"))]:
        assert f"`{name}`" in page or f"{{name: {name}, " in page, name
