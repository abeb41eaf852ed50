"""The newest tokens of a stream on the host's side, for drafters that look for what came before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

KEPT = 65536  # tokens; a search through them takes a small part of a millisecond


class History:
    """Tokens that a stream has read, and the one that it reads next; the oldest are forgotten.

    Attributes:
      total: tokens that it was ever given.

    Args:
      tokens: the first ones.
      kept: newest tokens that are remembered, at least.
    """

    def __init__(self, tokens: Iterable[int] | Int[np.ndarray, " N"] = (), kept: int = KEPT):
        self.total = 0
        self._kept = kept
        self._buffer = np.zeros(256, np.int32)
        self._held = 0
        self.extend(np.fromiter(tokens, np.int32))

    @property
    def tokens(self) -> Int[np.ndarray, " T"]:
        """What is remembered, oldest first: a view."""
        return self._buffer[: self._held]

    def since(self, total: int) -> Int[np.ndarray, " T"]:
        """The tokens that came after the first `total`, as far as they are remembered."""
        return self.tokens[max(self._held - (self.total - total), 0) :]

    def extend(self, tokens: Sequence[int] | Int[np.ndarray, " N"]) -> None:
        """Add the newest tokens."""
        new = np.asarray(tokens, np.int32)
        self.total += len(new)
        new = new[-2 * self._kept :]
        if self._held + len(new) > 2 * self._kept:  # half of what is held goes at a time
            stay = min(self._held, self._kept, 2 * self._kept - len(new))
            self._buffer[:stay] = self._buffer[self._held - stay : self._held].copy()
            self._held = stay
        if self._held + len(new) > len(self._buffer):
            self._buffer = np.pad(self._buffer, (0, max(len(self._buffer), len(new))))
        self._buffer[self._held : self._held + len(new)] = new
        self._held += len(new)

    def copy(self) -> History:
        """A history of its own, to go on in another way."""
        other = History(kept=self._kept)
        other.extend(self.tokens)
        other.total = self.total
        return other
