"""What queries attend to in what a stream holds, as a budget wants to know it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.kv.budgets.budget import Budget
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.compaction import all_held, attended, leading
from streamjax.kv.query import KVTokens, Query, State


@dataclasses.dataclass(frozen=True)
class Measuring(Cache):
    """`update` lets queries read the state of `old`, and returns what `budget` measures instead of a new state.

    stored: the queries' tokens are the newest that `old` holds; otherwise they would come next.
    """

    old: Cascade
    budget: Budget
    stored: bool

    @property
    def shares_values(self) -> bool:
        return self.old.shares_values

    def update(
        self, state: tuple[tuple[State, ...], None], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], Float[Array, "B M"]]:
        whole = attended(self.old, state[0], query, tokens, self.stored)
        held, _ = all_held(self.old, state[0], query, self.stored)
        assert query.valid is not None
        shares = query.shares(held.k, held.position, held.valid, whole.lse)
        first = query.position[:, 0] + leading(query.valid)
        before = held.valid & ((first[:, None, None] - held.position).astype(jnp.int32) > 0)
        return whole.out, self.budget.measured(shares, before)
