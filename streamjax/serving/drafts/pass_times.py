"""What a pass that reads guesses takes, in passes over one token a row: as it is measured while the engine runs."""

from __future__ import annotations

import statistics
from collections import deque

from streamjax.streaming.speculative.pace import pass_cost

KEPT = 9  # newest times of each kind, of which the median counts; the first one compiled and is left out
LEAST = 2  # of a kind, before it counts


class PassTimes:
    """Learns what passes take, by how many rows run. A few passes over one token a row come first, to be timed.

    Args:
      rows: of the batch, whose passes with guesses read `width` tokens of each.
      width: tokens of a row.
      fixed: the answer, where somebody knows it.
      more: what guessing takes beside the pass, until it is measured.

    Example:
      >>> times = PassTimes(rows=4, width=8)
      >>> for seconds in (9.0, 0.1, 0.1):  # the first one compiled
      ...     times.took(seconds, running=4, several=False)
      ...     times.took(4 * seconds, running=4, several=True)
      >>> times.cost(running=4)
      4.0
    """

    def __init__(self, rows: int, width: int, fixed: float | None = None, more: float = 0.0):
        self._fixed = fixed
        self._guessed = pass_cost(rows * width) / (1.0 if rows == 1 else pass_cost(rows)) + more
        self._single: dict[int, deque[float]] = {}
        self._several: deque[float] = deque(maxlen=KEPT)
        self._begun: set[int] = set()

    def took(self, seconds: float, running: int, several: bool) -> None:
        """A pass over so many rows that run is over; whether it read several tokens of them."""
        kind = 0 if several else running
        if kind not in self._begun:
            self._begun.add(kind)
        elif several:
            self._several.append(seconds)
        else:
            self._single.setdefault(running, deque(maxlen=KEPT)).append(seconds)

    def unknown(self, running: int) -> bool:
        """Whether passes over one token a row are still to be timed for so many rows."""
        return self._fixed is None and len(self._single.get(running, ())) < LEAST

    def cost(self, running: int) -> float:
        """Of a pass with guesses while so many rows run; by the platform until it is measured. At least 1."""
        if self._fixed is not None:
            return self._fixed
        known = [rows for rows, times in self._single.items() if len(times) >= LEAST]
        if len(self._several) < LEAST or not known:
            return self._guessed
        nearest = min(known, key=lambda rows: (abs(rows - running), rows))
        return max(statistics.median(self._several) / statistics.median(self._single[nearest]), 1.0)
