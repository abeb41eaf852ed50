"""Guesses from what was said before: the longest end of a stream that stands somewhere else too, and what followed it.

Three databases are asked, by how near they are in time (hierarchy drafting, 2502.05609): the stream itself, what the
model has generated in earlier streams, and a text. Where the first one has an answer the others are not asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from streamjax.field_checks import Size
from streamjax.streaming.speculative.drafter import Drafter, Drafts, Draws
from streamjax.streaming.speculative.history import History


@dataclasses.dataclass
class NGrams(Drafter):
    """Looks the newest tokens up; costs no pass of any model.

    Args:
      length: tokens guessed at most.
      shortest, longest: tokens that have to agree, and that are compared at most. Of the longest matches the newest is
        taken.
      text: ids of a text that is asked last, such as manuals or code that answers are likely to quote.

    Raises:
      ValueError: `longest` below `shortest`.

    Example:
      >>> state, tokens = sj.generate(model, state, prompt, max_new_tokens=64, sampler=greedy, draft=NGrams())
    """

    shortest: Size = 2
    longest: Size = 8
    text: Sequence[int] | np.ndarray = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest < self.shortest:
            raise ValueError(f"NGrams.longest is {self.longest}: it must be at least shortest, {self.shortest}")
        self.text = np.asarray(self.text, np.int32)
        self._recent = History()

    def propose(self, streams: Sequence[History], wanted: Sequence[bool], draws: Draws) -> Drafts:
        tokens = np.zeros((len(streams), self.length), np.int32)
        count = np.zeros(len(streams), np.int32)
        for row, stream in enumerate(streams):
            found = self._look_up(stream.tokens) if wanted[row] else ()
            count[row] = len(found)
            tokens[row, : len(found)] = found
        return Drafts(tokens, count)

    def learn(self, tokens: Int32[np.ndarray, " N"]) -> None:
        self._recent.extend(tokens)

    def _look_up(self, stream: Int32[np.ndarray, " T"]) -> Int32[np.ndarray, " N"]:
        end = stream[-self.longest :]
        for database in (stream, self._recent.tokens, np.asarray(self.text)):
            at = _newest_match(database, end, self.shortest)
            if at is None:
                continue
            found = database[at : at + self.length]
            if database is stream and len(found) < self.length:  # it repeats itself: so will what follows
                period = len(stream) - at
                found = np.resize(stream[-period:], self.length)
            return found
        return stream[:0]


def _newest_match(database: Int32[np.ndarray, " S"], end: Int32[np.ndarray, " N"], shortest: int) -> int | None:
    """Where the newest of the longest matches of `end` goes on; None where fewer than `shortest` tokens match."""
    if len(end) < shortest or len(database) <= shortest:
        return None
    places, found = np.flatnonzero(database[:-1] == end[-1]), None
    for n in range(1, len(end) + 1):
        if n > 1:
            places = places[places >= n - 1]
            places = places[database[places - (n - 1)] == end[-n]]
        if not len(places):
            break
        if n >= shortest:
            found = int(places[-1]) + 1
    return found
