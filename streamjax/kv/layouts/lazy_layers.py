"""How much queries look at the first and the newest tokens alone: what makes a layer lazy (SimLayerKV, 2410.13846)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.compaction import all_held, attended
from streamjax.kv.query import KVTokens, Query, State


@dataclasses.dataclass(frozen=True)
class NearShare(Cache):
    """`update` returns, instead of a new state, the share of attention of each row's queries that stays near.

    Near are the first `sinks` and the newest `window` tokens that `old` holds, and the queries' own chunk where its
    tokens are not `stored`. The mean over queries and heads.
    """

    old: Cascade
    sinks: int
    window: int
    stored: bool

    @property
    def shares_values(self) -> bool:
        return self.old.shares_values

    def update(
        self, state: tuple[tuple[State, ...], None], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], Float[Array, " B"]]:
        whole = attended(self.old, state[0], query, tokens, self.stored)
        held, _ = all_held(self.old, state[0], query, self.stored)
        mass = query.mass(held.k, held.position, held.valid, whole.lse)
        count = jnp.sum(held.valid, axis=2, keepdims=True)
        place = jnp.arange(mass.shape[2])
        far = held.valid & (place >= self.sinks) & (place < count - self.window)
        assert query.valid is not None
        asked = jnp.maximum(jnp.sum(query.valid, axis=1), 1) * mass.shape[1]
        far = jnp.repeat(far, mass.shape[1] // far.shape[1], axis=1)
        return whole.out, 1 - jnp.sum(jnp.where(far, mass, 0), axis=(1, 2)) / asked
