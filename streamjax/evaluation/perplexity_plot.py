"""The picture of a comparison: perplexity and cache memory against position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from streamjax.byte_units import human_bytes
from streamjax.evaluation.cache_trial import Trial
from streamjax.evaluation.curves import even_bins, log_bins
from streamjax.evaluation.pictures import save_picture

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
_GREY = "#606060"
_DASHES = ("-", "-", (0, (4, 2)))
_FIRST = 32  # a logarithmic axis begins here
_BINS = 32  # of an even axis


def plot_trials(
    trials: Sequence[Trial],
    path: str | Path | None,
    *,
    title: str = "",
    trained_length: int | None = None,
    even: bool = False,
) -> Figure:
    """Draw runs of one text side by side.

    Args:
      trials: the runs; a run that ended early is marked where it did.
      path: where the picture is written; its folder is made. None writes nothing.
      title: above the picture.
      trained_length: tokens that the model saw at once in training; marked.
      even: positions on an even axis, for a text of a few training lengths; on a logarithmic one otherwise.

    Returns:
      The figure.
    """
    figure = Figure(figsize=(8.5, 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    end = max((len(trial.nats) for trial in trials), default=1)
    for axis in (upper, lower):
        axis.set(xscale="linear" if even else "log", yscale="log")
    for index, trial in enumerate(trials):
        # Dashes over thicker lines: where runs agree, one does not hide the other.
        style = {"color": _COLOURS[index % len(_COLOURS)], "lw": max(2.6 - 0.4 * index, 1.4), "ls": _DASHES[index % 3]}
        position, nats = even_bins(trial.nats, max(end // _BINS, 1)) if even else log_bins(trial.nats)
        with np.errstate(over="ignore"):
            perplexity = np.exp(nats)
        upper.plot(position, perplexity, label=trial.name, **style)
        reached = np.unique(np.geomspace(_FIRST, max(len(trial.nats), _FIRST), 200).round().astype(int))
        in_use = np.array([trial.memory.in_use(int(p)) for p in reached], float)
        lower.plot(reached, in_use, **style)
        if trial.ended:
            mark = {"marker": "X", "color": style["color"], "ms": 11, "mec": "white", "ls": ""}
            upper.plot(position[-1], perplexity[-1], **mark)
            lower.plot(reached[-1], in_use[-1], **mark)
            room = reached[-1] < (0.6 if even else 0.25) * end  # behind the mark
            text = {
                "xytext": (9 if room else -9, -13),
                "textcoords": "offset points",
                "ha": "left" if room else "right",
            }
            lower.annotate(trial.ended, (reached[-1], in_use[-1]), color=style["color"], **text)
    upper.set_ylabel("perplexity a token")
    lower.set_ylabel("keys and values held")
    lower.set_xlabel("position in the stream (tokens)")
    for axis in (upper, lower):
        axis.set_xlim(0 if even else _FIRST, end * (1.03 if even else 1.15))
        axis.grid(which="major", color="#e0e0e0", lw=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    if trained_length is not None and trained_length < end:
        for axis in (upper, lower):
            axis.axvline(trained_length, color=_GREY, lw=1, ls=":")
        place = (trained_length, 0.01)
        lower.annotate(
            f"trained on {trained_length:,} ",
            place,
            xycoords=("data", "axes fraction"),
            ha="right",
            va="bottom",
            color=_GREY,
        )
    lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    lower.yaxis.set_minor_formatter(NullFormatter())
    _plain_ticks(upper)
    upper.legend(frameon=False, loc="best")
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    if path is not None:
        save_picture(figure, path)
    return figure


def _plain_ticks(axis: Axes) -> None:
    """Perplexities as plain numbers, at 1, 2, 5, 10, ... where they span little, at powers of ten where much."""
    low, high = axis.get_ylim()
    subs = (1.0, 2.0, 3.0, 5.0) if high / low < 200 else (1.0, 3.0) if high / low < 5000 else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(10, subs=subs))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
