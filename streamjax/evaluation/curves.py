"""Averages over a stream of numbers, kept small: a curve for an endless stream, and bins on a logarithmic axis."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass
class Curve:
    """The mean of an endless sequence of numbers, segment by segment, in bounded memory.

    Segments begin with `width` numbers each; when there are `max_points` of them, neighbours are joined and the width
    doubles. Sums are exact to float64.
    """

    width: int = 256
    max_points: int = 512

    def __post_init__(self) -> None:
        if self.width < 1 or self.max_points < 2 or self.max_points % 2:
            raise ValueError(f"Curve needs width >= 1 and an even max_points, got {self.width} and {self.max_points}")
        self._sums: list[float] = []
        self._open = 0.0  # sum of the last, unfinished segment
        self._filled = 0
        self.count = 0
        self.total = 0.0

    def add(self, values: Float[np.ndarray, " N"]) -> None:
        """Append numbers."""
        values = np.asarray(values, np.float64)
        self.count += len(values)
        self.total += float(values.sum())
        while len(values):
            taken, values = np.split(values, [min(self.width - self._filled, len(values))])
            self._open += float(taken.sum())
            self._filled += len(taken)
            if self._filled == self.width:
                self._sums.append(self._open)
                self._open, self._filled = 0.0, 0
                if len(self._sums) == self.max_points:
                    self._sums = [a + b for a, b in zip(self._sums[::2], self._sums[1::2], strict=True)]
                    self.width *= 2

    @property
    def mean(self) -> float:
        """Mean of everything; NaN where there is nothing."""
        return self.total / self.count if self.count else float("nan")

    def points(self) -> list[tuple[int, float]]:
        """Each segment's end (how many numbers there were by then) and mean; the last may be short."""
        points = [((i + 1) * self.width, total / self.width) for i, total in enumerate(self._sums)]
        if self._filled:
            points.append((self.count, self._open / self._filled))
        return points


def log_bins(
    values: Float[np.ndarray, " N"], least: int = 64, per_octave: int = 3
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Mean of numbers in bins of equal width on a logarithmic axis.

    Args:
      values: one number a position.
      least: numbers in a bin, at least: near the beginning bins are wider on the axis. Fewer only if there are no more.
      per_octave: bins between a position and its double.

    Returns:
      The bins' middles (geometric, counted from 1) and their means.
    """
    if not len(values):
        return np.zeros(0), np.zeros(0)
    edges = [0]
    while (edge := max(edges[-1] + least, round(edges[-1] * 2 ** (1 / per_octave)))) < len(values):
        edges.append(edge)
    if len(edges) > 1 and len(values) - edges[-1] < (edges[-1] - edges[-2]) / 2:
        edges.pop()  # a stub of a bin at the end would be mostly noise
    borders = np.array([*edges, len(values)])
    sums = np.add.reduceat(np.asarray(values, np.float64), borders[:-1])
    return np.sqrt((borders[:-1] + 1.0) * borders[1:]), sums / np.diff(borders)


def even_bins(values: Float[np.ndarray, " N"], width: int) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Mean of numbers, one a position, in bins of `width`; a rest of less than half of it joins the last bin.

    Returns:
      The bins' middles (counted from 1) and their means.
    """
    if not len(values):
        return np.zeros(0), np.zeros(0)
    edges = np.arange(0, len(values), width)
    if len(edges) > 1 and len(values) - edges[-1] < width / 2:
        edges = edges[:-1]
    borders = np.append(edges, len(values))
    sums = np.add.reduceat(np.asarray(values, np.float64), borders[:-1])
    return (borders[:-1] + 1 + borders[1:]) / 2, sums / np.diff(borders)
