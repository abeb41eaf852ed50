"""The picture of a leaderboard: the mean score of each method against the bytes that its state takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from streamjax.byte_units import human_bytes
from streamjax.evaluation.pictures import save_picture

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
_MARKS = "osD^vP*Xdph<>"


def plot_leaderboard(rows: Sequence[Mapping[str, Any]], path: str | Path | None, *, title: str = "") -> Figure:
    """Draw rows of a leaderboard; those of one method are joined, and what kept everything is a line across.

    Args:
      rows: as the leaderboard writes them; those without bytes or a mean are left out.
      path: where the picture is written; its folder is made. None writes nothing.
      title: above the picture.

    Returns:
      The figure.
    """
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if row.get("mean") is None or not row.get("state_bytes"):
            continue
        if row["method"] == "dense":
            axis.axhline(100 * row["mean"], color="#606060", ls=":", lw=1.2)
            axis.annotate("dense", (1, 100 * row["mean"]), xycoords=("axes fraction", "data"), ha="right", va="bottom")
            continue
        name = row["method"] + (f" ({row['source']})" if row.get("source") else "")
        point = (row["state_bytes"], 100 * row["mean"], 100 * (row.get("standard_error") or 0.0))
        lines.setdefault(name, []).append(point)
    for index, (name, points) in enumerate(lines.items()):
        sizes, means, errors = zip(*sorted(points), strict=True)
        axis.errorbar(sizes, means, errors, label=name, color=_COLOURS[index % len(_COLOURS)], capsize=2, lw=1.4,
                      marker=_MARKS[index % len(_MARKS)], ms=5, elinewidth=0.7,
                      ls="--" if "(" in name else "-")  # fmt: skip
    axis.set(xscale="log", xlabel="bytes of one stream's state", ylabel="mean score (%)", ylim=(-2, 102))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    axis.tick_params(axis="x", which="minor", labelsize=7)
    axis.grid(which="major", color="#e0e0e0", lw=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    if lines:
        axis.legend(frameon=False, fontsize=8, ncols=1 + len(lines) // 16, loc="upper left", bbox_to_anchor=(1, 1))
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    if path is not None:
        save_picture(figure, path)
    return figure
