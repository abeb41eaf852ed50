"""`Finch`: the attention of a question, each of its queries weighted by what it sees (Corallo, Papotti, 2408.00167)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.field_checks import Size
from streamjax.kv.noting import kept_within_block
from streamjax.kv.query import Query
from streamjax.kv.scores.score import Score
from streamjax.kv.scores.tova import newest_queries


@dataclasses.dataclass(frozen=True)
class Finch(Score):
    """The attention of the last `window` queries before the choice, times the number of tokens that each one sees.

    A later query sees more tokens and gives each less; the factor makes queries count alike. Where a cache is compacted
    by a question of up to `window` tokens, those are its queries. The number is counted up to what the cascade holds.
    """

    needs_attention: ClassVar[bool] = True

    window: Size = 64

    def check(self, every: int) -> None:
        if every < self.window:
            raise ValueError(f"Finch.window is {self.window}, but the tier makes room after every {every} tokens")

    def fold(self, shares: Float[Array, "B K G C S"], query: Query) -> Float[Array, "B K S"]:
        assert query.block is not None, "a cascade says where blocks are to tiers that ask for them"
        seen = jnp.minimum(query.index + 1, query.block.held).astype(shares.dtype)
        return newest_queries(shares * seen[:, None, None, :, None], query, self.window)

    def kept(self, note: Float[Array, "B K S"], query: Query) -> Float[Array, "B K S"]:
        return kept_within_block(note, query)
