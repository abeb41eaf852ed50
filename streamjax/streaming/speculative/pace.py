"""When to guess: a pass over several tokens costs more than one over a single token, so guesses have to be worth it."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Bool, Int

START, MOST = 2.0, 8.0  # what a stream may lose before it has won anything, and what it may lose at once later
SHARE = 1 / 32  # of its passes that a stream may lose for good


def pass_cost(tokens: int) -> float:
    """What a pass over two tokens or more takes on this platform, in passes over a single one."""
    # A CPU's product of one row is its fastest: SmolLM2-135M takes 2.5 times as long for 8 tokens and 2.9 for 16, in
    # turn with passes over one (benchmarks/serving/drafts.py).
    return 2.0 + 0.07 * tokens if jax.default_backend() == "cpu" else 1.0 + 0.02 * tokens


class Pace:
    """Streams guess while that does not make them slower: each has an account, in passes over a single token.

    A pass with guesses costs what it takes, and brings the tokens that it reads. Every token that a stream reads brings
    `SHARE` of a pass. A stream guesses unless it is in debt. So where nothing can be guessed, it takes 3% and a few
    passes longer; where much can be, it hardly ever pauses.

    Args:
      rows: streams.
      width: tokens of a pass with guesses.
      cost: of such a pass; measured on CPUs, a little more than 1 on other devices, where None.
    """

    def __init__(self, rows: int, width: int, cost: float | None = None):
        self._cost = pass_cost(width) if cost is None else cost
        self._account = np.full(rows, START)

    @property
    def wants(self) -> Bool[np.ndarray, " B"]:
        """The streams for which guesses are worth a try."""
        return self._account >= 0

    @property
    def pause(self) -> Int[np.ndarray, " B"]:
        """Tokens that each stream reads one by one before it guesses again; 0 where it wants to."""
        return np.ceil(np.maximum(-self._account, 0) / SHARE).astype(np.int64)

    def note(self, given: Int[np.ndarray, " B"], right: Int[np.ndarray, " B"]) -> None:
        """After a pass: how many tokens were guessed for each stream, and how many of them were right."""
        won = np.where(given > 0, 1 + right - self._cost, 0.0) + SHARE * (1 + right)
        self._account = np.minimum(self._account + won, MOST)
