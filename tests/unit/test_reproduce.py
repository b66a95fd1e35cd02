"""What `mslt reproduce` lists: the papers' tables, commands that exist, records that are there."""

from pathlib import Path

import pytest

from mslt.report.reproduce import BASE, RECORDS, fine_tuning_hours, markdown, pass_hours, reproductions
from tests.command_lines import refuse_unknown_options

ROOT = Path(__file__).parents[2]
NAMES = [
    "mslt-t2", "mslt-t3", "mslt-t4", "mslt-f3", "mslt-f4", "deebert-t1", "deebert-f2", "deebert-f3", "deebert-f4",
    "deebert-f5", "deebert-f6", "bv-t1", "bv-t2", "conv-t1", "conv-t2", "conv-f1", "conv-f2", "conv-f4",
]  # fmt: skip


def test_every_table_and_figure_is_listed_once() -> None:
    assert [one.name for one in reproductions()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_its_commands_exist(name: str) -> None:
    (one,) = (one for one in reproductions() if one.name == name)
    for line in one.commands:
        if not line.startswith(("printf ", "hf ")):  # a recipe, a download
            refuse_unknown_options(line)


def test_nothing_of_ours_stands_without_its_record() -> None:
    for one in reproductions():
        if one.ours is not None:
            assert (ROOT / RECORDS / one.ours.record).is_file(), one.name


def test_hours_are_operations_at_a_v100s_rate() -> None:
    width, tokens, rows = 768, 128, 1000
    layer = tokens * (24 * width**2 + 4 * tokens * width)
    assert pass_hours(BASE, rows) == pytest.approx(3 * 12 * layer * rows / (125e12 * 0.35) / 3600)
    # 4 rates, 5 seeds, 10 epochs of 2,490 rows.
    assert fine_tuning_hours("mslt", BASE, ["RTE"]) == pytest.approx(pass_hours(BASE, 20 * 10 * 2490))


def test_readme_shows_the_same() -> None:
    assert "\n".join(markdown(reproductions())) in (ROOT / "README.md").read_text(), (
        "put what `mslt reproduce --markdown` prints into README.md"
    )
