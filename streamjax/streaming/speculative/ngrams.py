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
      branches: ways to go on that it guesses at most, as a tree; they differ in their first token. The longest match
        says the first, shorter ones and the other databases the others.

    Raises:
      ValueError: `longest` below `shortest`.

    Example:
      >>> state, tokens = sj.generate(model, state, prompt, max_new_tokens=8, sampler=greedy, draft=sj.NGrams())
    """

    shortest: Size = 2
    longest: Size = 8
    text: Sequence[int] | np.ndarray = ()
    branches: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest < self.shortest:
            raise ValueError(f"NGrams.longest is {self.longest}: it must be at least shortest, {self.shortest}")
        self.text = np.asarray(self.text, np.int32)
        self._recent = History()

    @property
    def nodes(self) -> int:
        return self.branches * self.length

    @property
    def guesses_trees(self) -> bool:
        return self.branches > 1

    def smaller(self) -> Drafter | None:
        return self._with(branches=self.branches - 1) if self.branches > 1 else super().smaller()

    def propose(self, streams: Sequence[History], wanted: Sequence[bool], draws: Draws) -> Drafts:
        tokens, parents = np.zeros((2, len(streams), self.nodes), np.int32)
        count = np.zeros(len(streams), np.int32)
        for row, stream in enumerate(streams):
            if not wanted[row]:
                continue
            for found in self._look_up(stream.tokens):
                start, end = count[row], count[row] + len(found)
                tokens[row, start:end] = found
                parents[row, start + 1 : end] = np.arange(start + 1, end)
                count[row] = end
        return Drafts(tokens, count, parents if self.branches > 1 else None)

    def learn(self, tokens: Int32[np.ndarray, " N"]) -> None:
        self._recent.extend(tokens)

    def _look_up(self, stream: Int32[np.ndarray, " T"]) -> list[Int32[np.ndarray, " N"]]:
        if self.branches > 1:
            return self._ways(stream, self.branches, 0)
        end = stream[-self.longest :]
        for database in (stream, self._recent.tokens, np.asarray(self.text)):
            at = _newest_match(database, end, self.shortest)
            if at is not None:
                return [_continued(database, at, self.length, repeats=database is stream)]
        return []

    def ways(self, stream: Int32[np.ndarray, " T"], most: int) -> list[Int32[np.ndarray, " N"]]:
        """Up to `most` ways in which a stream may go on, of up to `length` + 1 tokens, which differ in their first one.

        They are for who knows the next token soon, but not yet: the `length` tokens behind it are those that `propose`
        would guess of the stream with that token. The likeliest way is the first.
        """
        return self._ways(stream, most, 1)

    def _ways(self, stream: Int32[np.ndarray, " T"], most: int, open: int) -> list[Int32[np.ndarray, " N"]]:
        """The same, where the first `open` tokens of a way belong to what has to agree, and `length` come behind."""
        found: dict[int, Int32[np.ndarray, " N"]] = {}
        for database in (stream, self._recent.tokens, np.asarray(self.text)):
            end = stream[-max(self.longest - open, 1) :]
            for at in _best_matches(database, end, max(self.shortest - open, 1), most):
                if len(found) < most:
                    way = _continued(database, at, self.length + open, repeats=database is stream)
                    found.setdefault(int(way[0]), way)
        return list(found.values())


def _continued(database: Int32[np.ndarray, " S"], at: int, length: int, *, repeats: bool) -> Int32[np.ndarray, " N"]:
    """What stands in a database from some place on; one that goes round is taken to go on so, where it `repeats`."""
    found = database[at : at + length]
    return np.resize(database[at:], length) if repeats and len(found) < length else found


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


def _best_matches(
    database: Int32[np.ndarray, " S"], end: Int32[np.ndarray, " N"], shortest: int, most: int
) -> list[int]:
    """Where matches of `end` go on, each with another token: the longest first, of equally long ones the newest."""
    if len(end) < shortest or len(database) <= shortest:
        return []
    places = np.flatnonzero(database[:-1] == end[-1])
    agreeing, longer = np.ones(len(places), np.int64), np.arange(len(places))
    for n in range(2, len(end) + 1):
        longer = longer[places[longer] >= n - 1]
        longer = longer[database[places[longer] - (n - 1)] == end[-n]]
        if not len(longer):
            break
        agreeing[longer] = n
    places, agreeing = places[agreeing >= shortest], agreeing[agreeing >= shortest]
    order = np.lexsort((places, agreeing))[::-1]
    _, first = np.unique(database[places[order] + 1], return_index=True)
    return (places[order[np.sort(first)[:most]]] + 1).tolist()
