"""`Sink > Window` in one buffer: the fast form of StreamingLLM's cache.

The algebra is that of the two tiers; tests hold them equal. Slots 0 .. sinks - 1 hold the sinks, the others the ring. A
single new token attends to the buffer with one call: the sinks' keys are rotated in place to the distance at which the
query must see them (their un-rotated keys, a few slots, are kept apart), and the window's keys never move.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from streamjax.attention.partial import Partial, merge
from streamjax.kv.ring import write_linear, write_ring
from streamjax.kv.tier import KVSpec, KVTokens, Query, Tier


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SinkWindowState:
    """Buffers of `sinks + window` slots.

    position: where each key stands, for a sink where the query of the last single step saw it. raw_k: the sinks' keys
    before rotation. origin: stream position of the first sink. sinks, filled: tokens in either part. cursor: the ring
    slot that the next token takes.
    """

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    position: UInt32[Array, "B 1 S"]
    raw_k: Float[Array, "B K N D"]
    origin: UInt32[Array, " B"]
    sinks: Int32[Array, " B"]
    cursor: Int32[Array, " B"]
    filled: Int32[Array, " B"]


@dataclasses.dataclass(frozen=True)
class SinkWindow(Tier):
    """The first `sinks` tokens and the newest `window`; `reach` is the farthest place behind the first sink."""

    sinks: int
    window: int
    reach: int

    @property
    def slots(self) -> int:
        return self.sinks + self.window

    @property
    def strict_reach(self) -> int | None:
        return self.window

    def init(self, spec: KVSpec) -> SinkWindowState:
        return SinkWindowState(
            k=spec.buffer(self.slots),
            v=spec.buffer(self.slots),
            position=jnp.zeros((spec.batch_size, 1, self.slots), jnp.uint32),
            raw_k=spec.buffer(self.sinks),
            origin=jnp.zeros((spec.batch_size,), jnp.uint32),
            sinks=spec.counter(),
            cursor=spec.counter(),
            filled=spec.counter(),
        )

    def absorb(self, state: SinkWindowState, query: Query, tokens: KVTokens) -> tuple[SinkWindowState, KVTokens]:
        start, count = tokens.run()
        taken = jnp.minimum(count, self.sinks - state.sinks)
        first = jnp.take_along_axis(tokens.position[:, 0], start[:, None], axis=1)[:, 0]
        origin = jnp.where((state.sinks == 0) & (taken > 0), first, state.origin)
        state = dataclasses.replace(
            state,
            v=write_linear(state.v, tokens.v, state.sinks, start, taken, axis=2),
            raw_k=write_linear(state.raw_k, tokens.raw_k, state.sinks, start, taken, axis=2),
            origin=origin,
            sinks=state.sinks + taken,
        )
        if query.q.shape[1] == 1:
            # Bring the sinks to the clamped distance from the one query, which stays at its true position.
            shift = query.position[:, 0] - self._place(origin, query)[:, 0]
            k, position = self._sink_keys(state, query, shift)
            state = dataclasses.replace(
                state,
                k=jax.lax.dynamic_update_slice_in_dim(state.k, k, 0, axis=2),
                position=jax.lax.dynamic_update_slice_in_dim(state.position, position, 0, axis=2),
            )
        index = jnp.arange(tokens.valid.shape[2], dtype=jnp.int32)[None, None]
        left = tokens.valid & (index >= (start + taken)[:, None, None])
        return state, dataclasses.replace(tokens, valid=left)

    def _place(self, origin: UInt32[Array, " B"], query: Query) -> UInt32[Array, "B C"]:
        """Where each query stands for the sinks."""
        return origin[:, None] + jnp.minimum(query.index, self.reach).astype(jnp.uint32)

    def _sink_keys(self, state: SinkWindowState, query: Query, shift: UInt32[Array, " B"]) -> tuple[Array, Array]:
        """The sinks' keys as if they had been written `shift` positions later, and those positions."""
        position = (state.origin + shift)[:, None] + jnp.arange(self.sinks, dtype=jnp.uint32)
        if query.rotary is None:
            return state.raw_k, position[:, None]
        k = query.rotary(jnp.swapaxes(state.raw_k, 1, 2), position)
        return jnp.swapaxes(k, 1, 2), position[:, None]

    def attend(self, state: SinkWindowState, query: Query, last: bool) -> Partial:
        slot = jnp.arange(self.slots)
        kept, filled = state.sinks[:, None, None], state.filled[:, None, None]
        if query.q.shape[1] == 1:
            valid = jnp.where(slot < self.sinks, slot < kept, slot - self.sinks < filled)
            return query.attend(state.k, state.v, state.position, valid)
        n = self.sinks
        k, position = self._sink_keys(state, query, jnp.zeros_like(state.origin))
        placed = query.at(self._place(state.origin, query))
        sinks = placed.attend(k, state.v[:, :, :n], position, slot[:n] < kept)
        ring = query.attend(
            state.k[:, :, n:], state.v[:, :, n:], state.position[:, :, n:], slot[n:] - n < filled, reach=self.window
        )
        return merge(sinks, ring)

    def insert(self, state: SinkWindowState, tokens: KVTokens) -> tuple[SinkWindowState, KVTokens]:
        start, count = tokens.run()

        def write(buffer: Array, chunk: Array) -> Array:
            return write_ring(buffer, chunk, state.cursor, start, count, axis=2, offset=self.sinks)

        new = dataclasses.replace(
            state,
            k=write(state.k, tokens.k),
            v=write(state.v, tokens.v),
            position=write(state.position, tokens.position),
            cursor=(state.cursor + count) % self.window,
            filled=jnp.minimum(state.filled + count, self.window),
        )
        return new, dataclasses.replace(tokens, valid=jnp.zeros_like(tokens.valid))
