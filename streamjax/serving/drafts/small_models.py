"""Guesses for the rows of an engine by a model that is cheaper to run than the one that it serves."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from streamjax.models.decoder import Decoder
from streamjax.serving.drafts.guessing import Guesses, Guessing, Line
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.speculative.drafter import Drafter, Drafts, Draws
from streamjax.streaming.speculative.history import History
from streamjax.streaming.speculative.small_model import SmallModel

CHUNK = 64  # tokens that it reads at a time, at most; each power of two below is a program
log = logging.getLogger(__name__)


class SmallModelGuessing(Guessing):
    """`Guessing` by a `SmallModel`, which has a stream of its own beside each row.

    It says how a row goes on from the last token that was read: first the token that the row draws next, and `length`
    behind it. They count where the row draws that token. It takes the likeliest tokens, so rows that draw by chance
    agree with it less often. A row that comes in, or was set aside, is read anew, as far as `SmallModel.context` says.

    Args:
      drafter: who guesses.
      model: that the engine serves.
      rows, vocab_size, cost: as in `Guessing`. Until that is measured, a pass of the drafter takes as
        much of one of the model as it has of its weights.
    """

    def __init__(self, drafter: SmallModel, model: Decoder, rows: int, vocab_size: int, cost: float | None = None):
        more = (1 + drafter.length) * _nbytes(drafter.model) / _nbytes(model)
        self._begin(drafter, 1 + drafter.length, rows, vocab_size, cost, more)
        chunk = min(drafter.chunk_size, CHUNK)
        self._small = dataclasses.replace(drafter, length=1 + drafter.length, chunk_size=chunk)
        self._nobody = [History() for _ in range(rows)]
        nothing = np.zeros(rows, np.int32), jnp.zeros((rows, 1))
        self._draws = Draws(Sampler(temperature=0), None, *nothing)

    def warm_up(self) -> None:
        small, everybody, nobody = self._small, [True] * self._rows, self._nobody
        width, most = 1, min(small.chunk_size, small.context)
        while True:
            streams = [History(np.zeros(width, np.int32)) for _ in nobody]
            small.propose(streams, everybody, self._draws)
            if width >= most:
                break
            width = min(2 * width, most)
        small.propose([*nobody[:1], *streams[1:]], everybody, self._draws)  # one row is another stream
        if small.drafter is not None:
            full = _Full(inner=small.drafter, length=small.drafter.length)
            dataclasses.replace(small, drafter=full).propose(streams, everybody, self._draws)
        small.propose(nobody, [False] * self._rows, self._draws)

    def _guess(self, lines: Sequence[Line | None], guesses: Guesses) -> None:
        streams = [none if line is None else line.history for line, none in zip(lines, self._nobody, strict=True)]
        try:
            drafts = self._small.propose(streams, [line is not None for line in lines], self._draws)
        except ValueError as error:  # its values are not finite: nobody is to suffer from that
            log.warning("the model that guesses has failed, and guesses no more: %s", error)
            self._account = -np.inf
            return
        for row, line in enumerate(lines):
            if line is not None:
                self._put(line, drafts.tokens[row, : drafts.count[row]], row, 0, guesses)

    def learn(self, tokens: Sequence[int]) -> None:
        self._small.learn(np.asarray(tokens, np.int32))


@dataclasses.dataclass(kw_only=True)
class _Full(Drafter):
    """Another drafter, which always has as many guesses as it can: so that passes over all of them are compiled."""

    inner: Drafter

    @property
    def nodes(self) -> int:
        return self.inner.nodes

    def propose(self, streams: Sequence[History], wanted: Sequence[bool], draws: Draws) -> Drafts:
        drafts = self.inner.propose(streams, wanted, draws)
        return Drafts(drafts.tokens, np.where(wanted, self.nodes, 0).astype(np.int32), drafts.parents)


def _nbytes(model: Decoder) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))
