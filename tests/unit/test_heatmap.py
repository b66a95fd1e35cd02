"""Pictures of values in cells."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from mslt.report.heatmap import DIFFERENCE, HeatMap, draw_heatmaps, heat_map, limits_of


def test_values_stand_in_their_cells_readable_on_any_colour() -> None:
    _, axes = pyplot.subplots()
    values = np.array([[0.0, 0.25, 1.0], [0.5, np.nan, 0.75]])
    heat_map(axes, values, ["a", "b"], ["0", "1", "2"], 0, 1)
    assert [text.get_text() for text in axes.texts] == [".00" if v == 0 else f"{v:.2f}".removeprefix("0")
                                                       for v in (0.0, 0.25, 1.0, 0.5, 0.75)]  # fmt: skip
    assert (axes.texts[0].get_color(), axes.texts[2].get_color()) == ("white", "black")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    pyplot.close()


def test_what_is_said_of_a_cell_stands_about_its_value() -> None:
    _, axes = pyplot.subplots()
    heat_map(axes, np.array([[1.0, -2.0]]), ["a"], ["0", "1"], -2, 2, DIFFERENCE, "{:+.1f}", [[True, False]])
    assert [text.get_text() for text in axes.texts] == ["(+1.0)", "-2.0"]
    pyplot.close()


def test_many_cells_have_no_numbers_unless_asked_for() -> None:
    _, axes = pyplot.subplots()
    names = [str(index) for index in range(14)]
    heat_map(axes, np.zeros((1, 14)), ["a"], names, 0, 1)
    assert not axes.texts
    heat_map(axes, np.zeros((1, 14)), ["a"], names, 0, 1, DIFFERENCE, "{:.1f}")
    assert len(axes.texts) == 14
    pyplot.close()


def test_differences_part_at_0() -> None:
    assert limits_of(np.array([[1.0, -3.0, np.nan]]), is_difference=True) == (-3, 3)
    assert limits_of(np.array([[1.0, 3.0]]), is_difference=False) == (1, 3)
    assert limits_of(np.array([[2.0]]), is_difference=False) == (1.5, 2.5)
    assert limits_of(np.array([[np.nan]]), is_difference=True) == (-1, 1)


@pytest.mark.parametrize("is_difference", [False, True])
def test_a_picture_is_written_whole(tmp_path: Path, is_difference: bool) -> None:
    picture = tmp_path / "new" / "map.png"
    one = HeatMap("a$b", ["tree_depth", "a$b"], ["0", "1"], [[1, -2], [float("nan"), 4]])
    draw_heatmaps([one, one], picture, "layer", is_difference)
    assert [file.name for file in picture.parent.iterdir()] == ["map.png"]
    with Image.open(picture) as found:
        assert found.size[0] > 200
