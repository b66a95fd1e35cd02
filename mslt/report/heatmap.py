"""Heat maps: numbers in rows and columns as colours, with the numbers in them."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from mslt.files import whole_file

CELL_INCHES = (0.52, 0.3)
MOST_COLUMNS = 3  # maps side by side


@dataclass(frozen=True)
class HeatMap:
    """`values` [rows][columns]; NaN where there is none."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]


def draw_heatmaps(
    maps: Sequence[HeatMap], picture: Path, column_label: str = "", diverging: bool = False, decimals: int = 1
) -> None:
    """Write a PNG of the maps. `diverging` is for differences: 0 is white, and all maps share the scale; else each map
    has its own."""
    columns = min(len(maps), MOST_COLUMNS)
    lines = -(-len(maps) // columns)
    most_rows, most_columns = (max(len(of) for of in sizes) for sizes in ([m.rows for m in maps],
                                                                          [m.columns for m in maps]))  # fmt: skip
    longest = max(len(name) for each in maps for name in each.rows)
    width = CELL_INCHES[0] * most_columns + 0.075 * longest + 1.0
    height = CELL_INCHES[1] * most_rows + 0.9
    figure, grid = pyplot.subplots(
        lines, columns, squeeze=False, figsize=(width * columns, height * lines), layout="constrained"
    )
    shared = max((abs(v) for each in maps for v in _numbers(each)), default=0.0) or 1e-9
    for place, axes in enumerate(grid.flat):
        if place >= len(maps):
            axes.set_visible(False)
            continue
        each = maps[place]
        numbers = _numbers(each) or [0.0]
        low, high = (-shared, shared) if diverging else (min(numbers), max(max(numbers), min(numbers) + 1e-9))
        image = axes.imshow(each.values, cmap="RdBu_r" if diverging else "viridis", vmin=low, vmax=high, aspect="auto")
        axes.set_title(each.title, fontsize=9, parse_math=False)
        axes.set_xticks(range(len(each.columns)), each.columns, fontsize=7)
        axes.set_yticks(range(len(each.rows)), each.rows, fontsize=7, parse_math=False)
        axes.set_xlabel(column_label, fontsize=8)
        for row, line in enumerate(each.values):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    red, green, blue, _ = image.cmap(image.norm(value))
                    is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                    axes.text(column, row, f"{value:+.{decimals}f}" if diverging else f"{value:.{decimals}f}",
                              ha="center", va="center", fontsize=6, color="white" if is_dark else "black")  # fmt: skip
        figure.colorbar(image, ax=axes, shrink=0.9, aspect=25, pad=0.02).ax.tick_params(labelsize=6)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(picture) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)


def write_heatmaps_csv(maps: Sequence[HeatMap], path: Path) -> None:
    """A line for each number: map, row, column, value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["map", "row", "column", "value"])
        for each in maps:
            for row, line in zip(each.rows, each.values, strict=True):
                for column, value in zip(each.columns, line, strict=True):
                    if not math.isnan(value):
                        writer.writerow([each.title, row, column, value])


def _numbers(each: HeatMap) -> list[float]:
    return [value for line in each.values for value in line if not math.isnan(value)]
