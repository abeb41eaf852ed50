"""`StaticEviction`: of each block of tokens the best go on to the next tier, and the others are gone for good.

MPCache (Zeng et al., 2501.06807) looks once at a prompt's tokens and drops those that got little attention, before it
chooses among the others for each query. So this tier keeps nothing for itself: what stands behind it may be pages,
clusters or low rank, and gets fewer tokens.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from streamjax.attention.rotary import Rotary
from streamjax.kv.query import KVSpec, KVTokens, State, Stored
from streamjax.kv.slots.slot_state import SlotState, take_slots
from streamjax.kv.tiers.scored import Scored, ScoredState, lowest


@dataclasses.dataclass(frozen=True, repr=False)
class StaticEviction(Scored):
    """Passes on the `size` tokens with the highest score of every `every` that come; it is never the last tier.

    Tokens of a block are read until the block is over. The best of them then fall to the next tier, in their order, as
    the next block comes in. At compaction all tokens are one block, of which as large a share goes on.

    Args:
      size: tokens of a block that go on.
      score: ranks them, as in `Scored`; one that does not remember what it said last.
      per_head: each key head passes on tokens of its own, to a tier that takes them.
      every: tokens of a block.

    Raises:
      ValueError: sizes that make no sense, or what only a tier that keeps tokens can do.
    """

    shares_values: ClassVar[bool] = True

    per_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size > self.every:
            raise ValueError(f"StaticEviction.size is {self.size}: a block has {self.every} tokens, as every says")
        if self.distance is not None or self.merge is not None or self.codec is not None:
            raise ValueError("StaticEviction keeps no tokens: it takes no distance, no merge rule and no codec")
        if self.score.remembers:
            raise ValueError(f"StaticEviction asks its score once: {self.score!r} remembers what it said before")

    @property
    def slots(self) -> int:
        return self.every

    def init(self, spec: KVSpec) -> ScoredState:
        heads = spec.kv_heads if self.per_head or spec.per_head else 1
        position = jnp.zeros((spec.batch_size, heads, self.every), jnp.uint32)
        buffers = spec.buffer(self.every), spec.values(self.every)
        return self._empty(spec, *buffers, position, jnp.zeros(position.shape, bool), self.every)

    def stored(self, state: ScoredState, rotary: Rotary | None) -> Stored:
        return super().stored(state, rotary)

    def store(self, state: ScoredState, tokens: KVTokens) -> ScoredState:
        raise ValueError("StaticEviction passes tokens on: put a tier behind it, such as sj.kv.Full(8192)")

    def _chosen(self, state: ScoredState, tokens: KVTokens, gone: bool) -> ScoredState:
        """Where a block is over: what does not go on is gone, and what does falls first."""
        due = state.clock >= self.every

        def choose(slots: SlotState) -> tuple[Array, Array]:
            # Fused with the write, this read would make the CPU compiler copy the whole buffer.
            slots = jax.lax.optimization_barrier(slots)
            rank = self._ranked(slots, state.memory, state.now, tokens)
            stays = best_of(rank, slots.position, slots.valid, state.now, jnp.full_like(state.clock, self.size))
            age = (state.now[:, None, None] - slots.position).astype(jnp.int32)
            order = jnp.argsort(jnp.where(stays, -age, jnp.iinfo(jnp.int32).max), axis=2, stable=True)
            here = due[:, None, None]
            return jnp.where(here, order.astype(jnp.int32), state.free), jnp.where(here, stays, slots.valid)

        def wait(slots: SlotState) -> tuple[Array, Array]:
            return state.free, slots.valid

        free, valid = jax.lax.cond(due.any(), choose, wait, jax.lax.stop_gradient(state.slots))
        none = jnp.zeros_like(state.clock)
        return dataclasses.replace(
            state,
            slots=dataclasses.replace(state.slots, valid=valid),
            free=free,
            taken=jnp.where(due, none, state.taken),
            clock=jnp.where(due, none, state.clock),
        )

    def filled(
        self, state: ScoredState, tokens: KVTokens, memory: State, now: UInt32[Array, " B"]
    ) -> tuple[ScoredState, KVTokens]:
        """An empty state, and the best of all these tokens, in their order; see `Scored.filled`."""
        shape = (*state.slots.valid.shape[:2], tokens.valid.shape[2])
        position, valid = (jnp.broadcast_to(x, shape) for x in (tokens.position, tokens.valid))
        _, count = tokens.run()
        note = tokens.score if state.slots.note is not None else None
        rank = self._ranked(
            SlotState(tokens.k, tokens.v, position, valid, count, note), memory, now, tokens, whole=True
        )
        some = count // self.every * self.size + -(-(count % self.every) * self.size // self.every)
        stays = best_of(rank, position, valid, now, some)
        order = jnp.argsort(~stays, axis=2, stable=True).astype(jnp.int32)

        def take(x: Array) -> Array:
            return take_slots(x, jnp.broadcast_to(order, (*x.shape[:2], order.shape[2])))

        k, v, raw_k = (take(x) for x in (tokens.k, tokens.v, tokens.raw_k))
        rest = dataclasses.replace(
            tokens, k=k, v=v, raw_k=raw_k, position=take(position), valid=take(stays)[:, :1], score=None
        )
        return dataclasses.replace(state, memory=memory, now=now), rest


def best_of(
    rank: Float[Array, "B N S"],
    position: UInt32[Array, "B N S"],
    valid: Bool[Array, "B N S"],
    now: UInt32[Array, " B"],
    count: Int32[Array, " B"],
) -> Bool[Array, "B N S"]:
    """Which tokens are the `count` best of each row and head, of equals the newest; all where there are no more."""
    slots = rank.shape[2]
    place = jnp.argsort(lowest(rank, position, valid, now, slots), axis=2)
    return valid & (place >= slots - count[:, None, None])
