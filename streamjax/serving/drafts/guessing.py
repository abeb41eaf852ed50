"""Guesses for the rows of an engine: how they may go on, and whether a pass over several tokens is worth it now."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from streamjax.serving.drafts.pass_times import PassTimes
from streamjax.streaming.speculative.drafter import Drafter
from streamjax.streaming.speculative.heads.tree_drafter import TreeDrafter
from streamjax.streaming.speculative.history import History
from streamjax.streaming.speculative.ngrams import NGrams
from streamjax.streaming.speculative.pace import MOST, SHARE, START

WAYS = 4  # in which a row may go on; the token that it draws says which
LEARNING = 0.25  # of a new figure, in the mean of guesses that were right
KEPT = 2048  # newest tokens that an idle conversation keeps for guesses


@dataclasses.dataclass(eq=False)
class Line:
    """What guesses for one request need.

    history: the tokens that its stream has read, as far as they are known. hope: guesses that are right in a pass, a
    running mean. limit: of tokens that may come, how many are read at most; None: all.
    """

    history: History
    hope: float
    limit: Callable[[Sequence[int]], int] | None = None


class Guesses(NamedTuple):
    """Of each of B rows M ways to go on, of `lengths` tokens each; the first is the token that the row draws next.

    tokens: None where guesses are made on the device, for the token that a row has drawn; there is one way then.
    """

    tokens: Int32[np.ndarray, "B M N"] | None
    lengths: Int32[np.ndarray, "B M"]


class Guessing:
    """Guesses by n-grams where that makes no request later: a pass over several tokens takes longer for all rows.

    It is tried when what the guesses have brought in the mean is more than the pass takes longer, both in tokens of all
    rows that run: where few of many rows repeat themselves, and in a full batch on hardware whose arithmetic is the
    limit, it is not. What is lost all the same is bounded as by `Pace`: 3% of the tokens and a few passes.

    Args:
      drafter: who guesses.
      rows: of the batch.
      vocab_size: of the model; guesses of other ids are dropped.
      cost: of a pass over several tokens a row, in passes over one token a row. Where None it is measured, and until
        then the platform says it (`PassTimes`).

    Attributes:
      guessed, right: tokens that were guessed and read, and those of them that rows would have drawn.
    """

    def __init__(self, drafter: NGrams, rows: int, vocab_size: int, cost: float | None = None):
        self._ngrams = drafter
        self._begin(drafter, 1 + drafter.length, rows, vocab_size, cost)

    def _begin(
        self, drafter: Drafter, width: int, rows: int, vocab_size: int, cost: float | None, more: float = 0.0
    ) -> None:
        """width: tokens that a pass with guesses reads of a row. more: what guessing takes beside it, as a cost."""
        self.guessed = self.right = 0
        self._drafter, self._rows, self._vocab = drafter, rows, vocab_size
        self._times = PassTimes(rows, width, cost, more)
        self._account = START

    def begin(self, tokens: Sequence[int] | np.ndarray, limit: Callable[[Sequence[int]], int] | None) -> Line:
        """Guesses for a request whose stream has read these tokens."""
        return Line(History(tokens), self._drafter.length / 2, limit)

    def propose(self, lines: Sequence[Line | None], running: int) -> Guesses | None:
        """Guesses for the rows that have a line, while so many are `running`; None where they are not worth it."""
        loss, hope = running * (self._times.cost(running) - 1), sum(line.hope for line in lines if line is not None)
        if self._times.unknown(running) or self._account < 0 or hope <= loss:
            return None
        guesses = self.nothing()
        self._guess(lines, guesses)
        gains = np.array([0.0 if line is None else line.hope for line in lines])
        return guesses if gains[(guesses.lengths > 1).any(axis=1)].sum() > loss else None

    def warm_up(self) -> None:
        """Compile what guessing needs of its own."""

    def nothing(self) -> Guesses:
        """No guesses, in the shape of all that `propose` gives."""
        shape = (self._rows, WAYS)
        return Guesses(np.zeros((*shape, 1 + self._drafter.length), np.int32), np.zeros(shape, np.int32))

    def _guess(self, lines: Sequence[Line | None], guesses: Guesses) -> None:
        """Put guesses for the rows that have a line in their places."""
        for row, line in enumerate(lines):
            if line is not None:
                for way, found in enumerate(self._ngrams.ways(line.history.tokens, WAYS)):
                    self._put(line, found, row, way, guesses)

    def _put(self, line: Line, found: Int32[np.ndarray, " N"], row: int, way: int, guesses: Guesses) -> None:
        """Put one way in its place, as far as its ids are the model's and may be read."""
        assert guesses.tokens is not None
        known = int(np.cumprod((found >= 0) & (found < self._vocab)).sum())
        if line.limit is not None and known > 1:
            known = line.limit(found[:known].tolist())
        guesses.tokens[row, way, : len(found)], guesses.lengths[row, way] = found, known

    def note(self, line: Line, tokens: Sequence[int], guessed: int) -> None:
        """A pass has read these tokens of a row, of which `guessed` guesses had been given."""
        line.history.extend(tokens)
        right = max(len(tokens) - 1, 0) if guessed else 0
        self._account += SHARE * len(tokens)
        if guessed:
            line.hope += LEARNING * (right - line.hope)
            self._account += right
            self.guessed += guessed
            self.right += right
        else:
            line.hope += SHARE * (self._drafter.length / 2 - line.hope)  # what follows may be another kind of text

    def ran(self, rows: int, several: bool, seconds: float | None = None) -> None:
        """A pass is over, of so many rows that ran; whether it read several tokens, and what it took by itself."""
        if seconds is not None:
            self._times.took(seconds, rows, several)
        loss = rows * (self._times.cost(rows) - 1) * several
        self._account = min(self._account - loss, MOST * max(rows, 1))

    def learn(self, tokens: Sequence[int]) -> None:
        """A request has ended, which had generated these tokens."""
        self._drafter.learn(np.asarray(tokens, np.int32))


class TrainedGuessing(Guessing):
    """The same by what was trained: trees that are grown on the device, behind the tokens that rows have drawn there.

    So nobody knows on the host what is guessed: a row that has to stop in front of something (`Line.limit`) gets none.
    """

    def __init__(self, drafter: TreeDrafter, rows: int, vocab_size: int, cost: float | None = None):
        self._begin(drafter, drafter.pass_width, rows, vocab_size, cost)

    def nothing(self) -> Guesses:
        return Guesses(None, np.zeros((self._rows, 1), np.int32))

    def _guess(self, lines: Sequence[Line | None], guesses: Guesses) -> None:
        for row, line in enumerate(lines):
            if line is not None:
                guesses.lengths[row] = 1 + self._drafter.length if line.limit is None else 1
