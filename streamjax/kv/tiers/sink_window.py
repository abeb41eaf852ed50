"""`Sink > Window` in one buffer: the fast form of StreamingLLM's cache.

The algebra is that of the two tiers; tests hold them equal. Slots 0 .. sinks - 1 are the sinks, the others the ring. A
single new token attends to the buffer with one call: the sinks' keys are rotated in place to the distance at which the
query must see them (un-rotated keys of the few sinks are kept apart), and the window's keys never move.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels.partial import Partial, merge
from streamjax.attention.rotary import Rotary
from streamjax.field_checks import Size, check_fields
from streamjax.kv.decode_kernels import decode, kernel_decodes
from streamjax.kv.query import KVSpec, KVTokens, Query, Stored
from streamjax.kv.slots.ring_buffer import write_ring
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.full import LinearState, append
from streamjax.kv.tiers.sink import TRUE_DISTANCE, clamped, placed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SinkWindowState:
    """Buffers of `sinks + window` slots.

    position: where each key stands; for a sink, where the query of the last single step saw it. first: the sinks as
    they came, keys not rotated, at their true positions. cursor, filled: of the ring.
    """

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S V"]
    position: UInt32[Array, "B N S"]
    first: LinearState
    cursor: Int32[Array, " B"]
    filled: Int32[Array, " B"]


@dataclasses.dataclass(frozen=True)
class SinkWindow(Tier):
    """The first `sinks` tokens and the newest `window`; `reach` is the farthest place behind the first sink."""

    shares_values: ClassVar[bool] = True
    alters_every: ClassVar[int | None] = None

    sinks: Size
    window: Size
    reach: Size

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def slots(self) -> int:
        return self.sinks + self.window

    @property
    def reach_back(self) -> int | None:
        return self.window

    def init(self, spec: KVSpec) -> SinkWindowState:
        return SinkWindowState(
            k=spec.buffer(self.slots),
            v=spec.values(self.slots),
            position=spec.positions(self.slots),
            first=LinearState.empty(spec, self.sinks),
            cursor=spec.counter(),
            filled=spec.counter(),
        )

    def absorb(self, state: SinkWindowState, query: Query, tokens: KVTokens) -> tuple[SinkWindowState, KVTokens]:
        first, rest = append(state.first, dataclasses.replace(tokens, k=tokens.raw_k))
        state = dataclasses.replace(state, first=first)
        if query.q.shape[1] == 1:
            # Bring the sinks to the clamped distance from the one query, which stays at its true position.
            shift = query.position - clamped(query, first.position, self.reach)
            position = first.position + shift[:, None]
            stand = first.position if self.reach == TRUE_DISTANCE else position  # see `placed`

            def place(buffer: Array, sinks: Array) -> Array:
                # A row without a token keeps its state bit for bit.
                some = tokens.valid.any(axis=(1, 2)).reshape(-1, *[1] * (buffer.ndim - 1))
                sinks = jnp.where(some, sinks, jax.lax.slice_in_dim(buffer, 0, self.sinks, axis=2))
                # Fused with the write, this read would make the TPU compiler copy the whole buffer at every token.
                sinks = jax.lax.optimization_barrier(sinks)
                return jax.lax.dynamic_update_slice_in_dim(buffer, sinks, 0, axis=2)

            state = dataclasses.replace(
                state,
                k=place(state.k, self._rotated(first, query.rotary, stand)),
                v=place(state.v, first.v),
                position=place(state.position, position),
            )
        return state, dataclasses.replace(rest, k=tokens.k)

    def _rotated(
        self, first: LinearState, rotary: Rotary | None, position: UInt32[Array, "B M N"]
    ) -> Float[Array, "B K N D"]:
        """The sinks' keys as if they had been written at `position`."""
        if rotary is None:
            return first.k
        return jnp.swapaxes(rotary(jnp.swapaxes(first.k, 1, 2), position[:, 0]), 1, 2)

    def stored(self, state: SinkWindowState, rotary: Rotary | None) -> Stored:
        n, first = self.sinks, state.first
        slot = jnp.arange(self.slots)
        valid = jnp.where(slot < n, slot < first.filled[:, None, None], slot - n < state.filled[:, None, None])

        def both(sinks: Array, buffer: Array) -> Array:
            return jnp.concatenate((sinks, buffer[:, :, n:]), axis=2)

        k = both(self._rotated(first, rotary, first.position), state.k)
        return Stored(k, both(first.v, state.v), both(first.position, state.position), valid)

    def attend(self, state: SinkWindowState, query: Query, reach: int | None) -> Partial:
        if kernel_decodes(query, state.k):  # the ring fills when the sinks are full: what is held is a prefix
            return decode(query, state.k, state.v, state.first.filled + state.filled)
        slot = jnp.arange(self.slots)
        n, first = self.sinks, state.first
        kept, filled = first.filled[:, None, None], state.filled[:, None, None]
        if query.q.shape[1] == 1:
            valid = jnp.where(slot < n, slot < kept, slot - n < filled)
            return query.attend(state.k, state.v, state.position, valid)
        keys = self._rotated(first, query.rotary, first.position)
        sinks = placed(query, first.position, self.reach).attend(keys, first.v, first.position, slot[:n] < kept)
        ring = query.attend(
            state.k[:, :, n:], state.v[:, :, n:], state.position[:, :, n:], slot[n:] - n < filled, reach=reach,
            filled=state.filled,
        )  # fmt: skip
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
