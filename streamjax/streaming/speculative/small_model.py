"""Guesses from a model that is cheaper to run: a smaller one, or the same one under a small cache.

It reads what the streams have read, so far as its cache holds it, and goes on by itself. It may have a drafter of its
own, which guesses what it would guess: staged and cascaded drafting (2308.04623, 2312.11462), the n-grams at the end.
Of a long stream it may read what retrieval finds in it, and not the newest tokens alone (RAPID, 2502.20330).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from streamjax.field_checks import Size
from streamjax.kv.cache import Cache
from streamjax.models.decoder import Decoder
from streamjax.streaming.scan import read
from streamjax.streaming.speculative.decoding import Rounds
from streamjax.streaming.speculative.drafter import Drafter, Drafts, Draws
from streamjax.streaming.speculative.history import History
from streamjax.streaming.speculative.retrieval import Retrieval
from streamjax.streaming.state import StreamState, batch_axes, init_state


@dataclasses.dataclass(kw_only=True)
class SmallModel(Drafter):
    """A model that drafts.

    With the model itself and a small cache it is a draft of the same weights, cheaper where the cache of the stream is
    what a token costs: `dense` or pages of a long context.

    Args:
      length: tokens guessed at most.
      model: who guesses; it has the vocabulary of the model that it guesses for.
      cache: what it keeps of the streams, as `init_state` takes it.
      context: newest tokens that it reads of a stream of which it knows nothing yet, or has missed more.
      chunk_size: tokens that it reads at a time.
      drafter: who guesses for it; nobody where None.
      retrieval: which older tokens it reads then, in front of those; none where None. What it finds must fit into the
        cache, `context` included, or is soon forgotten.

    Example:
      >>> draft = sj.SmallModel(model=model, cache=sj.kv.preset("streaming_llm", window=60), drafter=sj.NGrams())
      >>> session = sj.Session(model, tokenizer, sj.kv.preset("streaming_llm"), draft=draft)
    """

    model: Decoder
    cache: Cache | Sequence[Cache]
    context: Size = 512
    chunk_size: Size = 512
    drafter: Drafter | None = None
    retrieval: Retrieval | None = None
    length: Size = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._state: StreamState | None = None
        self._read: list[int] = []  # of each stream, how much of its history has been read
        self._streams: list[History] = []

    def held_bytes(self, rows: int, model: Decoder) -> tuple[int, int]:
        state = jax.eval_shape(lambda: init_state(self.model, self.cache, rows, note_used=True))
        weights, inner = (0, 0) if self.drafter is None else self.drafter.held_bytes(rows, self.model)
        if self.model is not model:
            weights += sum(leaf.nbytes for leaf in jax.tree.leaves(self.model))
        one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        return weights, 2 * one + inner  # where it stands, and a copy that goes on

    def propose(self, streams: Sequence[History], wanted: Sequence[bool], draws: Draws) -> Drafts:
        self._catch_up(streams)
        assert self._state is not None
        own = jax.tree.map(jnp.copy, self._state)  # what is guessed may be wrong: the state does not keep it
        rounds = Rounds(
            self.model, own, self.drafter, [stream.copy() for stream in streams],
            sampler=draws.sampler, key=draws.key, index=draws.index,
        )  # fmt: skip
        found: list[list[int]] = [[] for _ in streams]
        left = np.where(wanted, self.length - 1, 0)  # the last one is chosen and need not be read
        while left.any():
            for row, new in enumerate(rounds.go(left)):
                found[row].extend(new)
                left[row] -= len(new)
        tokens = np.zeros((len(streams), self.length), np.int32)
        for row, new in enumerate(found):
            tokens[row] = [*new, *[rounds.certain[row]] * (self.length - len(new))]
        return Drafts(tokens, np.where(wanted, self.length, 0).astype(np.int32))

    def _catch_up(self, streams: Sequence[History]) -> None:
        """Read what the streams have read since, their newest tokens included."""
        fresh = np.ones(len(streams), bool)
        if len(streams) == len(self._streams):
            known = zip(streams, self._streams, self._read, strict=True)
            fresh = np.array([new is not old or new.total - n > self.context for new, old, n in known], bool)
        if fresh.any():
            empty = init_state(self.model, self.cache, len(streams), note_used=True)
            self._state = empty if fresh.all() or self._state is None else _replaced(self._state, empty, fresh)
        new = [
            self._beginning(stream) if fresh[row] else stream.since(self._read[row]).copy()
            for row, stream in enumerate(streams)
        ]
        assert self._state is not None
        if any(map(len, new)):
            self._state = read(self.model, self._state, new, self.chunk_size)
        self._streams, self._read = list(streams), [stream.total for stream in streams]

    def _beginning(self, stream: History) -> Int32[np.ndarray, " N"]:
        """What is read of a stream of which nothing is known."""
        if self.retrieval is None:
            return stream.since(stream.total - self.context).copy()
        return self.retrieval.read(stream.tokens, self.context)

    def learn(self, tokens: np.ndarray) -> None:
        if self.drafter is not None:
            self.drafter.learn(tokens)


@partial(jax.jit, donate_argnames="state")
def _replaced(state: StreamState, others: StreamState, which: Bool[Array, " B"]) -> StreamState:
    """The streams, those of `which` by others."""

    def choose(x: Array, other: Array, axis: int) -> Array:
        return jnp.where(which.reshape(-1, *[1] * (x.ndim - 1 - axis)), other, x)

    return jax.tree.map(choose, state, others, batch_axes(state))
