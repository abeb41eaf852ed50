"""`Scissorhands`: how often a token got more than its share of attention (Liu et al., 2305.17118)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.kv.noting import kept_within_block
from streamjax.kv.query import Query
from streamjax.kv.scores.score import Score


@dataclasses.dataclass(frozen=True)
class Scissorhands(Score):
    """How many queries since the last choice gave a token more than the mean of all that they see.

    The paper counts how often a token gets less, which orders the tokens that all of these queries see the same way.
    The mean of a query that sees n tokens is 1 / n; n is counted up to what the cascade holds.
    """

    needs_attention: ClassVar[bool] = True

    def fold(self, shares: Float[Array, "B K G C S"], query: Query) -> Float[Array, "B K S"]:
        assert query.block is not None, "a cascade says where blocks are to tiers that ask for them"
        seen = jnp.minimum(query.index + 1, query.block.held).astype(shares.dtype)
        return jnp.sum(shares > 1 / seen[:, None, None, :, None], axis=(2, 3), dtype=jnp.float32)

    def kept(self, note: Float[Array, "B K S"], query: Query) -> Float[Array, "B K S"]:
        return kept_within_block(note, query)
