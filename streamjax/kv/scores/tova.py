"""`TOVA`: the attention of the newest query decides (Oren et al., 2401.06104)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.kv.noting import kept_within_block
from streamjax.kv.query import Query
from streamjax.kv.scores.score import Score


@dataclasses.dataclass(frozen=True)
class TOVA(Score):
    """The attention that the last query before the choice gives; the paper averages heads: `per_head=False`."""

    needs_attention: ClassVar[bool] = True

    def fold(self, shares: Float[Array, "B K G C S"], query: Query) -> Float[Array, "B K S"]:
        return newest_queries(shares, query, 1)

    def kept(self, note: Float[Array, "B K S"], query: Query) -> Float[Array, "B K S"]:
        return kept_within_block(note, query)


def newest_queries(shares: Float[Array, "B K G C S"], query: Query, count: int) -> Float[Array, "B K S"]:
    """The attention that the last `count` queries of a block give, over the heads that share a key head."""
    assert query.block is not None, "a cascade says where blocks are to tiers that ask for them"
    newest = query.block.place(shares.shape[3]) >= query.block.every - count
    return jnp.einsum("bkgcs,bc->bks", shares, newest.astype(shares.dtype), precision="highest")
