"""`KVzip`: the most attention that any query gave (Kim et al., 2505.23416)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.kv.query import Query
from streamjax.kv.scores.score import Score


@dataclasses.dataclass(frozen=True)
class KVzip(Score):
    """The largest share that one query of one head gave a token, over the query heads that share a key head.

    The paper asks by letting the model repeat its context: `sj.compact` with the queries of `sj.reconstruction`. In a
    stream the queries are those that come, a token's own included.
    """

    needs_attention: ClassVar[bool] = True

    def fold(self, shares: Float[Array, "B K G C S"], query: Query) -> Float[Array, "B K S"]:
        return jnp.max(shares, axis=(2, 3))

    def joined(self, note: Float[Array, "B K S"], more: Float[Array, "B K S"]) -> Float[Array, "B K S"]:
        return jnp.maximum(note, more)
