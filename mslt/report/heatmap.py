"""Heat maps: values in cells, rows and columns named, each value written where there is room."""

import csv
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from mslt.files import whole_file

CELL_INCHES = (0.52, 0.3)
MOST_COLUMNS = 3  # maps side by side
DIFFERENCE = "RdBu"  # colours that part at 0
MOST_CELLS_WITH_NUMBERS = 13  # on a side, without a format of the numbers' own


@dataclass(frozen=True)
class HeatMap:
    """`values` [rows][columns], NaN where there is none; of each its interval, and whether it stands in brackets, where
    the map has these."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    intervals: Sequence[Sequence[tuple[float, float]]] | None = None
    in_brackets: Sequence[Sequence[bool]] | None = None


def draw_heatmaps(
    maps: Sequence[HeatMap], picture: Path, column_label: str = "", diverging: bool = False, decimals: int = 1
) -> None:
    """Write a PNG of the maps. `diverging` is for differences: their colours part at 0, and all maps share the scale;
    else each map has its own."""
    columns = min(len(maps), MOST_COLUMNS)
    lines = -(-len(maps) // columns)
    longest = max(len(name) for each in maps for name in each.rows)
    width = CELL_INCHES[0] * max(len(each.columns) for each in maps) + 0.075 * longest + 1.0
    height = CELL_INCHES[1] * max(len(each.rows) for each in maps) + 0.9
    figure, grid = pyplot.subplots(
        lines, columns, squeeze=False, figsize=(width * columns, height * lines), layout="constrained"
    )
    shared = limits_of(np.concatenate([np.ravel(each.values) for each in maps]), is_difference=True)
    for axes, each in zip_longest(grid.flat, maps):
        if each is None:
            axes.set_visible(False)
            continue
        values = np.asarray(each.values, dtype=float)
        low, high = shared if diverging else limits_of(values, is_difference=False)
        colours = DIFFERENCE if diverging else "viridis"
        written = f"{{:+.{decimals}f}}" if diverging else f"{{:.{decimals}f}}"
        image = heat_map(axes, values, each.rows, each.columns, low, high, colours, written, each.in_brackets)
        axes.set_title(each.title, fontsize=9, parse_math=False)
        axes.set_xlabel(column_label, fontsize=8)
        figure.colorbar(image, ax=axes, shrink=0.9, aspect=25, pad=0.02).ax.tick_params(labelsize=6)
    write_picture(figure, picture)


def limits_of(values: np.ndarray, is_difference: bool) -> tuple[float, float]:
    """What the ends of the colours stand for."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return -1.0, 1.0
    if is_difference:
        most = float(np.abs(finite).max()) or 1.0
        return -most, most
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def heat_map(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    low: float,
    high: float,
    colours: str = "viridis",
    written: str | None = None,
    in_brackets: Sequence[Sequence[bool]] | None = None,
) -> Any:
    """The image, drawn into `axes`. Values stand in their cells with `written`, or as .25 where they are few."""
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto" if written else "equal")
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        axis.set_ticks(range(len(names)), list(names), fontsize=7, parse_math=False)
    if written is None and max(values.shape) > MOST_CELLS_WITH_NUMBERS:
        return image
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.2f}".removeprefix("0") if written is None else written.format(value)
            if in_brackets is not None and in_brackets[row][column]:
                text = f"({text})"
            red, green, blue, _ = image.cmap(image.norm(value))
            is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if is_dark else "black")
    return image


def write_picture(figure: Any, picture: Path) -> None:
    picture.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(picture) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands there; the JSON has the token
        figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)


CSV_HEADER = ["map", "row", "column", "value", "low", "high", "in_brackets"]


def write_heatmaps_csv(maps: Sequence[HeatMap], path: Path) -> None:
    """A line for each number, with its interval and whether it stands in brackets, empty where the map has none.
    `read_heatmaps_csv` reads the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_HEADER)
        for each in maps:
            for (row, column), value in np.ndenumerate(np.asarray(each.values, dtype=float)):
                if not math.isnan(value):
                    interval = ("", "") if each.intervals is None else each.intervals[row][column]
                    bracketed = "" if each.in_brackets is None else int(each.in_brackets[row][column])
                    writer.writerow([each.title, each.rows[row], each.columns[column], value, *interval, bracketed])


def read_heatmaps_csv(path: Path) -> list[HeatMap]:
    """The maps of a file by `write_heatmaps_csv`; none where the file is another's."""
    with open(path, newline="") as file:
        reader = csv.reader(file)
        if next(reader, None) != CSV_HEADER:
            return []
        lines = list(reader)
    maps = []
    for title in dict.fromkeys(line[0] for line in lines):
        cells = {(row, column): float(value) for name, row, column, value, *_ in lines if name == title}
        rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
        values = [[cells.get((row, column), math.nan) for column in columns] for row in rows]
        maps.append(HeatMap(title, rows, columns, values))
    return maps
