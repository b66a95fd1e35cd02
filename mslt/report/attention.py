"""Pictures of attention: maps of one text, side by side (Figure 3 of Yang et al. 2020, arXiv:2011.13635), and how alike
the layers of two encoders are."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from mslt.evaluate.attention import Likeness, TextMaps
from mslt.report.heatmap import heat_map, write_picture

TOKEN_INCHES = 0.12  # what a token's name takes
MAP_INCHES = (1.5, 8.0)
PICTURE_INCHES2 = 3000.0  # at 130 dots an inch 50 million of them


def draw_maps(texts: Sequence[TextMaps], head: int | None, picture: Path) -> None:
    """Write a PNG: a row for each checkpoint, its layers side by side, of one head; or, where `head` is None, a row for
    each layer of each checkpoint, its heads side by side. One colour scale, of square roots, so that small weights show
    beside large ones."""
    rows: list[tuple[TextMaps, list[tuple[int, int]]]] = []  # (layer's index, head) of each map
    for maps in texts:
        L, H, _, _ = maps.weights_LHTT.shape
        if head is None:
            rows += [(maps, [(index, h) for h in range(H)]) for index in range(L)]
        else:
            rows.append((maps, [(index, head) for index in range(L)]))
    num_columns = max(len(places) for _, places in rows)
    longest = max(len(maps.tokens) for maps in texts)
    inches = min(max(MAP_INCHES[0], TOKEN_INCHES * longest), MAP_INCHES[1])
    inches = min(inches, math.sqrt(PICTURE_INCHES2 / num_columns / len(rows)))
    figure, grid = pyplot.subplots(
        len(rows), num_columns, squeeze=False, layout="compressed",
        figsize=((inches + 0.15) * num_columns + 2.0, (inches + 0.35) * len(rows) + 1.6),
    )  # fmt: skip
    most = max(maps.weights_LHTT[index, h].max().item() for maps, places in rows for index, h in places)
    alike = all(maps.tokens == texts[0].tokens for maps in texts)
    for row, (maps, places) in enumerate(rows):
        for column, axes in enumerate(grid[row]):
            if column >= len(places):
                axes.set_visible(False)
                continue
            index, h = places[column]
            image = axes.imshow(maps.weights_LHTT[index, h].numpy(), cmap="viridis", norm=PowerNorm(0.5, 0, most))
            axes.set_title(f"layer {maps.layers[index]}, head {h}", fontsize=8)
            below = next((r for r in range(row + 1, len(rows)) if len(rows[r][1]) > column), None)
            _name_tokens(axes, maps.tokens, inches, on_y=column == 0, on_x=below is None or not alike)
        if head is not None or row == 0 or rows[row - 1][0] is not maps:
            grid[row, 0].annotate(
                _short(maps.name), (0, 1), (0, 16), xycoords="axes fraction", textcoords="offset points", fontsize=8,
                fontweight="bold", parse_math=False, annotation_clip=False,
            )  # fmt: skip
    figure.suptitle("attention of each token (row) to each token (column); layers and heads count from 0", fontsize=9)
    bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 4.0 / (inches * len(rows))), aspect=30, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("weight, on a scale of square roots", fontsize=8)
    write_picture(figure, picture)


def draw_likeness(likeness: Likeness, picture: Path) -> None:
    """Write a PNG of a heat map for each measure: the first checkpoint's layers downwards, the other's to the right."""
    shown: list[tuple[str, Any, bool]] = []
    if likeness.js_LK is not None:
        shown.append(("attention: Jensen-Shannon distance (0: alike)", likeness.js_LK.numpy(), False))
    if likeness.cka is not None:
        shown.append(("hidden states: linear CKA (1: alike)", likeness.cka.numpy(), True))
    cell = min(0.42, 9.0 / max(map(len, likeness.layers)))
    height, width = (max(cell * (len(layers) + 1), 2.8) for layers in likeness.layers)
    figure, grid = pyplot.subplots(
        1, len(shown), squeeze=False, layout="compressed", figsize=((width + 1.4) * len(shown), height + 1.4)
    )
    for axes, (title, values, is_cka) in zip(grid[0], shown, strict=True):
        rows, columns = (["emb"] * is_cka + [str(layer) for layer in layers] for layers in likeness.layers)
        image = heat_map(axes, values, rows, columns, 0, 1, "viridis" if is_cka else "viridis_r")
        axes.set_title(title, fontsize=9)
        for name, axis in zip(likeness.names[::-1], (axes.xaxis, axes.yaxis), strict=True):
            axis.set_label_text(f"layer of {_short(name)}, from 0", fontsize=8, parse_math=False)
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    figure.suptitle(f"{likeness.num_texts:,} sentences, {likeness.num_tokens:,} tokens", fontsize=8)
    write_picture(figure, picture)


def _name_tokens(axes: Axes, tokens: Sequence[str], inches: float, on_x: bool, on_y: bool) -> None:
    """Each token's name, or as many as there is room for."""
    every = max(1, math.ceil(0.85 * TOKEN_INCHES * len(tokens) / inches))
    places, names = range(0, len(tokens), every), tokens[::every]
    axes.set_xticks(places if on_x else [], names if on_x else [], rotation=90, fontsize=6, parse_math=False)
    axes.set_yticks(places if on_y else [], names if on_y else [], fontsize=6, parse_math=False)
    axes.tick_params(length=1.5, pad=1)


def _short(name: str, most: int = 48) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
