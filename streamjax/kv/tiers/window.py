"""`Window`: the most recent tokens, in a ring buffer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels.partial import Partial
from streamjax.kv.decode_kernels import decode, kernel_decodes
from streamjax.kv.ring_buffer import materialized_once, ordered_after, read_ring, write_ring
from streamjax.kv.tier import KVSpec, KVTokens, Query, Tier


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingState:
    """A ring of slots; `cursor` is the slot that the next token takes, `filled` how many hold tokens.

    score: the attention that each token got so far, from each query head; None where nothing notes it. ids: of the
    tokens; None where no tier asks for them.
    """

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    position: UInt32[Array, "B 1 S"]
    cursor: Int32[Array, " B"]
    filled: Int32[Array, " B"]
    score: Float[Array, "B H S"] | None = None
    ids: Int32[Array, "B 1 S"] | None = None


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
        index = jnp.arange(width, dtype=jnp.int32)[None] - state.filled[:, None]
        shape = (chunk.shape[0], 1, width) + (1,) * (chunk.ndim - 3)
        stored = read_ring(buffer, oldest, width, axis=2)
        own = jnp.take_along_axis(chunk, jnp.clip(start[:, None] + index, 0, width - 1).reshape(shape), axis=2)
        return jnp.where((index < 0).reshape(shape), stored, own)

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


@dataclasses.dataclass(frozen=True)
class Window(Tier):
    """Keeps the `size` tokens before the query: a query at position p sees keys in [p - size, p], itself included.

    `size` is StreamingLLM's `recent_size`; a model's own `sliding_window = W` is `Window(W - 1)`. Where only
    windows follow it is strict; before other tiers, tokens about to fall stay visible until their chunk is stored.

    With `observe_attention` it notes how much attention each of its tokens gets, for the tiers behind it; a cascade
    asks for that by itself where a tier needs it. With `keep_ids` it keeps the ids of its tokens for them, likewise.
    """

    size: int
    observe_attention: bool = False
    keep_ids: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Window.size must be at least 1 token, got {self.size}")

    @property
    def slots(self) -> int:
        return self.size

    @property
    def reach_back(self) -> int | None:
        return self.size

    def init(self, spec: KVSpec) -> RingState:
        buffers = spec.buffer(self.size), spec.buffer(self.size), spec.positions(self.size)
        score = spec.scores(self.size) if self.observe_attention else None
        ids = spec.positions(self.size).astype(jnp.int32) if self.keep_ids else None
        return RingState(*buffers, spec.counter(), spec.counter(), score, ids)

    def attend(self, state: RingState, query: Query, reach: int | None) -> Partial:
        if kernel_decodes(query, state.k):
            return decode(query, state.k, state.v, state.filled, (state.cursor - state.filled) % self.size)
        valid = jnp.arange(self.size) < state.filled[:, None, None]
        return query.attend(state.k, state.v, state.position, valid, reach=reach, filled=state.filled)

    def observe(self, state: RingState, query: Query, lse: Float[Array, "B C H"], reach: int | None) -> RingState:
        if state.score is None:
            return state
        valid = jnp.arange(self.size) < state.filled[:, None, None]
        more = query.mass(state.k, state.position, valid, lse, reach)
        return dataclasses.replace(state, score=state.score + more)

    def store(self, state: RingState, tokens: KVTokens) -> RingState:
        return write(state, tokens)

    def insert(self, state: RingState, tokens: KVTokens) -> tuple[RingState, KVTokens]:
        return push(state, tokens)
