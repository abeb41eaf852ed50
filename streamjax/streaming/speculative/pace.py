"""When to guess: a pass over several tokens costs more than one over a single token, so guesses have to be worth it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int

LONGEST_PAUSE = 16  # tokens


class Pace:
    """Streams whose guesses were wrong pause: 1 token after the first failure in a row, then 3, 7, at most 16.

    A guess has failed if fewer than `worth` of its tokens were right. So where nothing can be guessed, one pass in 17
    reads guesses in vain, and a stream that begins to repeat itself is found out soon.

    Args:
      rows: streams.
      worth: tokens that must be right. A pass over 8 tokens takes a CPU twice as long as one over a single token, other
        devices hardly longer.
    """

    def __init__(self, rows: int, worth: int):
        self._worth = worth
        self._failures = np.zeros(rows, np.int64)
        self._pause = np.zeros(rows, np.int64)

    @property
    def wants(self) -> Bool[np.ndarray, " B"]:
        """The streams for which guesses are worth a try."""
        return self._pause == 0

    def note(self, given: Int[np.ndarray, " B"], right: Int[np.ndarray, " B"]) -> None:
        """After a pass: how many tokens were guessed for each stream, and how many of them were right."""
        guessed = given > 0
        self._pause = np.maximum(self._pause - 1, 0)
        failed = guessed & (right < np.minimum(self._worth, given))
        self._failures = np.where(failed, self._failures + 1, np.where(guessed, 0, self._failures))
        pause = np.minimum(2 ** np.minimum(self._failures, 8) - 1, LONGEST_PAUSE)
        self._pause = np.where(failed, pause, self._pause)
