"""`CurrentChunk`: what a layer that attends within chunks (Llama 4) keeps of a stream, the chunk that it is in.

A chunk of a stream is `size` tokens, counted from the stream's first one. A query sees the tokens of its own chunk;
with the first token of the next one all of them are forgotten, and places in the chunk begin at 0 again. So a stream
never runs out, and no counter has to reach further than one chunk.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.partial import Partial, add_sink_logits, merge
from streamjax.barriers import ordered_after
from streamjax.field_checks import Size, check_fields
from streamjax.kv.cache import Cache
from streamjax.kv.decode_kernels import decode, kernel_decodes
from streamjax.kv.query import KVSpec, KVTokens, Query
from streamjax.kv.slots.ring_buffer import write_linear
from streamjax.kv.tiers.full import LinearState


@dataclasses.dataclass(frozen=True)
class CurrentChunk(Cache):
    """Keeps the tokens of the chunk that a stream is in: at most `size - 1`, since the last one ends the chunk.

    There is a slot more, with which the slots of published sizes fill whole tiles of a TPU, as its kernel wants them.

    The model's own `attention_chunk_size` is `size`. Layers that have one keep it under every preset.

    Raises:
      ValueError: a size below 2, with which a token would see itself alone.
    """

    alters_every: ClassVar[int | None] = None

    size: Size

    def __post_init__(self) -> None:
        check_fields(self)
        if self.size < 2:
            raise ValueError("CurrentChunk.size is 1: a token would see itself alone, use 2 or more")

    @property
    def slots(self) -> int:
        return self.size

    @property
    def span(self) -> int:
        return self.size

    @property
    def capacity(self) -> None:
        return None

    @property
    def reach(self) -> int:
        return self.size - 1

    def init(self, spec: KVSpec) -> LinearState:
        """An empty state; `filled` is the place that a stream's next token has in its chunk."""
        return LinearState.empty(spec, self.slots)

    def update(self, state: LinearState, query: Query, tokens: KVTokens) -> tuple[Float[Array, "B C H D"], LinearState]:
        place = state.filled[:, None] + query.offset
        query = dataclasses.replace(query, back=place % self.size)
        parts = self._attend(state, query), query.attend_own(tokens, self.reach)
        out = add_sink_logits(merge(*parts), query.sink_logits).out
        valid = tokens.valid if query.answered else ordered_after(tokens.valid, out)
        return out, self._store(state, dataclasses.replace(tokens, valid=valid))

    def _attend(self, state: LinearState, query: Query) -> Partial:
        """To what is stored of the chunk, which queries of later chunks do not see."""
        if kernel_decodes(query, state.k):
            return decode(query, state.k, state.v, state.filled)
        return query.attend(state.k, state.v, state.position, state.valid, filled=state.filled)

    def _store(self, state: LinearState, tokens: KVTokens) -> LinearState:
        """The newest tokens, as many as there are since the last chunk ended, behind those of the same chunk."""
        start, count = tokens.run()
        ends = state.filled + count >= self.size
        filled = (state.filled + count) % self.size
        cursor, start, taken = (
            jnp.where(ends, other, one)
            for one, other in ((state.filled, 0), (start, start + count - filled), (count, filled))
        )

        def write(buffer: Array, chunk: Array) -> Array:
            return write_linear(buffer, chunk, cursor, start, taken, axis=2)

        return LinearState(
            write(state.k, tokens.k), write(state.v, tokens.v), write(state.position, tokens.position), filled
        )
