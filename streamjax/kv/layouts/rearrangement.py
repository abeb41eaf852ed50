"""`Rearrangement`: tokens of several dense states at new places in one, and new tokens among them.

Keys turn to their new places by the difference alone, which is exact at any distance: the phase is an integer.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from pallas_kernels.partial import add_sink_logits, merge
from streamjax.kv.cache import Cache
from streamjax.kv.query import KVSpec, KVTokens, Query, State
from streamjax.kv.slots.slot_state import take_slots
from streamjax.kv.tiers.full import Full


class Source(NamedTuple):
    """A state that tokens come from: which of them, and how many positions each is moved on (modulo 2^32)."""

    state: State
    keep: Bool[Array, "B S"]
    by: UInt32[Array, "B S"]


@dataclasses.dataclass(frozen=True)
class Rearrangement(Cache):
    """`update` lets new tokens read the sources' at their new places, and returns a state of `new` that has all.

    Its state is the position of the first token, and the sources, one for each of `olds`. Of what is kept nothing is
    computed but the rotation of its keys; what stands behind a new token does not see it.
    """

    olds: tuple[Full, ...]
    new: Full

    @property
    def shares_values(self) -> bool:
        return True

    @property
    def span(self) -> int:
        return self.new.capacity + 1

    def update(
        self, state: tuple[UInt32[Array, " B"], tuple[Source, ...]], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], State]:
        first, sources = state
        found = []
        for old, source in zip(self.olds, sources, strict=True):
            held, by = old.stored(source.state, query.rotary), source.by[:, None]
            k = held.k if query.rotary is None else query.rotary.moved(held.k, by)
            found.append((k, held.v, held.position + by, held.valid & source.keep[:, None]))
        k, v, position, valid = (jnp.concatenate(parts, axis=2) for parts in zip(*found, strict=True))
        parts = query.attend(k, v, position, valid), query.attend_own(tokens, None)
        whole = add_sink_logits(merge(*parts), query.sink_logits)
        given = (k, v, position, valid), (tokens.k, tokens.v, tokens.position, tokens.valid)
        k, v, position, valid = (jnp.concatenate((x, y.astype(x.dtype)), axis=2) for x, y in zip(*given, strict=True))
        place = jnp.where(valid, (position - first[:, None, None]).astype(jnp.int32), jnp.iinfo(jnp.int32).max)
        order = jnp.argsort(place, axis=2, stable=True)[..., : self.new.capacity].astype(jnp.int32)
        k, v, position, valid = (
            take_slots(x, jnp.broadcast_to(order, (*x.shape[:2], order.shape[2]))) for x in (k, v, position, valid)
        )
        rows, heads, _, width = k.shape
        spec = KVSpec(rows, heads, width, k.dtype, query.q.shape[2] // heads, value_dim=v.shape[-1])
        return whole.out, self.new.store(self.new.init(spec), KVTokens(k, v, k, position, valid, rotary=query.rotary))
