"""`RingState`: tokens in a ring of slots, new ones written over the oldest. Windows and pages store by it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from streamjax.barriers import materialized_once, ordered_after
from streamjax.kv.ring_buffer import read_ring, write_ring
from streamjax.kv.tier import KVTokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingState:
    """A ring of slots; `cursor` is the slot that the next token takes, `filled` how many hold tokens.

    score: what is noted of the attention that each token got so far; None where nothing is. ids: of the tokens; None
    where no tier asks for them. N is 1, or the key heads where each has tokens of its own.
    """

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S V"]
    position: UInt32[Array, "B N S"]
    cursor: Int32[Array, " B"]
    filled: Int32[Array, " B"]
    score: Float[Array, "B M S"] | None = None
    ids: Int32[Array, "B 1 S"] | None = None

    @property
    def valid(self) -> Bool[Array, "B 1 S"]:
        """Which slots hold tokens, in a ring that fills from slot 0 on."""
        return jnp.arange(self.k.shape[2]) < self.filled[:, None, None]


def push(state: RingState, tokens: KVTokens, keep: int | None = None) -> tuple[RingState, KVTokens]:
    """Write tokens over the oldest ones; return the tokens that fell out, oldest first, left-aligned.

    `keep` is how many tokens stay: as many as there are slots where None.
    """
    start, count = tokens.run()
    slots, width = state.k.shape[2], tokens.k.shape[2]
    fallen = jnp.maximum(state.filled + count - (keep or slots), 0)
    oldest = (state.cursor - state.filled) % slots

    def evict(buffer: Array, chunk: Array) -> Array:
        # The oldest `fallen` of what was stored followed by the run: stored ones first, then the run's own.
        if width <= (keep or slots):
            return read_ring(buffer, oldest, width, axis=2)  # none of the run falls
        index = jnp.arange(width, dtype=jnp.int32)[None] - state.filled[:, None]
        own = jnp.clip(start[:, None] + index, 0, width - 1)
        index = jnp.where(index < 0, (state.cursor[:, None] + index) % slots, slots + own)
        both = jnp.concatenate((buffer, chunk.astype(buffer.dtype)), axis=2)
        shape = (chunk.shape[0], 1, width) + (1,) * (chunk.ndim - 3)
        return jnp.take_along_axis(both, index.reshape(shape), axis=2, mode="promise_in_bounds")

    evicted = KVTokens(
        k=evict(state.k, tokens.k),
        v=evict(state.v, tokens.v),
        raw_k=jnp.zeros_like(tokens.raw_k),
        position=evict(state.position, tokens.position),
        valid=jnp.arange(width) < fallen[:, None, None],
        rotary=tokens.rotary,
        score=None if state.score is None or tokens.score is None else evict(state.score, tokens.score),
        ids=None if state.ids is None or tokens.ids is None else evict(state.ids, tokens.ids),
    )
    # In place, though what is overwritten goes on to other tiers: read once, and before anything is written.
    evicted = materialized_once(evicted, count)
    read = (evicted.k, evicted.v) if evicted.score is None else (evicted.k, evicted.v, evicted.score)
    evicted = dataclasses.replace(evicted, outputs=tokens.outputs)
    return write(state, tokens, keep, ordered_after(count, *read)), evicted


def write(
    state: RingState, tokens: KVTokens, keep: int | None = None, count: Int32[Array, " B"] | None = None
) -> RingState:
    """`push` where nobody asks for what falls out, which is not read then. `count`: of the tokens, if known."""
    start, known = tokens.run()
    count, slots = known if count is None else count, state.k.shape[2]

    def put(buffer: Array, chunk: Array) -> Array:
        return write_ring(buffer, chunk, state.cursor, start, count, axis=2)

    return RingState(
        put(state.k, tokens.k),
        put(state.v, tokens.v),
        put(state.position, tokens.position),
        (state.cursor + known) % slots,
        jnp.minimum(state.filled + known, keep or slots),
        None if state.score is None or tokens.score is None else put(state.score, tokens.score),
        None if state.ids is None or tokens.ids is None else put(state.ids, tokens.ids),
    )
