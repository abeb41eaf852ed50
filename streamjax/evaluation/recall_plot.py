"""The picture of a recall run: accuracy by length and depth, a panel for each cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from streamjax.evaluation.pictures import save_picture
from streamjax.evaluation.recall import Cell


def plot_recall(cells: Sequence[Cell], path: str | Path | None, *, title: str = "", trained_length: int = 0) -> Figure:
    """Draw accuracy, a row of panels for each task and a panel for each cache.

    Args:
      cells: what was run; what is missing stays grey.
      path: where the picture is written; its folder is made. None writes nothing.
      title: above the picture.
      trained_length: tokens that the model saw at once in training; marked between lengths.

    Returns:
      The figure.
    """
    caches, tasks = list(dict.fromkeys(c.cache for c in cells)), list(dict.fromkeys(c.task for c in cells))
    lengths, depths = sorted({c.length for c in cells}), sorted({c.depth for c in cells})
    size = (1.6 + len(caches) * max(0.62 * len(lengths), 1.8), 1.4 + len(tasks) * max(0.36 * len(depths), 1.3))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), len(caches), squeeze=False, sharex=True, sharey=True)
    image = None
    for (row, task), (column, cache) in ((r, c) for r in enumerate(tasks) for c in enumerate(caches)):
        axis = axes[row][column]
        grid = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            if (cell.task, cell.cache) == (task, cache):
                grid[depths.index(cell.depth), lengths.index(cell.length)] = cell.accuracy
        axis.set_facecolor("#d0d0d0")
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (y, x), value in np.ndenumerate(grid):
            if np.isfinite(value):
                axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(lengths)), [short_count(length) for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
        beyond = sum(length <= trained_length for length in lengths)
        if 0 < beyond < len(lengths):
            axis.axvline(beyond - 0.5, color="black", lw=1, ls=":")
        axis.set_title(cache if row == 0 else "", fontsize=9)
        if column == 0:
            axis.set_ylabel(f"{task}\ndepth")
        if row == len(tasks) - 1:
            axis.set_xlabel("tokens of context")
    if image is not None:
        figure.colorbar(image, ax=axes, label="answered to the letter", shrink=0.8)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    if path is not None:
        save_picture(figure, path)
    return figure


def short_count(count: int) -> str:
    """A number of tokens in short: 512, 16K, 1M."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{name}"
    return f"{count:,}"
