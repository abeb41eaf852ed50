"""`SnapKV`: the attention of an observation window of queries, pooled over neighbours (Li et al., 2404.14469)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from streamjax.field_checks import Size
from streamjax.kv.noting import kept_within_block
from streamjax.kv.query import Query
from streamjax.kv.scores.score import Held, Score
from streamjax.kv.scores.tova import newest_queries


@dataclasses.dataclass(frozen=True)
class SnapKV(Score):
    """The attention of the last `window` queries before the choice; each token's is pooled over `kernel` neighbours.

    Neighbours are tokens next to each other among those that compete. With pool="mean" what is outside counts as 0.
    """

    needs_attention: ClassVar[bool] = True

    window: Size = 32
    kernel: Size = 5
    pool: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise ValueError(f"SnapKV.kernel is {self.kernel}: it must be odd, a token and as many on either side")

    def check(self, every: int) -> None:
        if every < self.window:
            raise ValueError(f"SnapKV.window is {self.window}, but the tier makes room after every {every} tokens")

    def fold(self, shares: Float[Array, "B K G C S"], query: Query) -> Float[Array, "B K S"]:
        return newest_queries(shares, query, self.window)

    def kept(self, note: Float[Array, "B K S"], query: Query) -> Float[Array, "B K S"]:
        return kept_within_block(note, query)

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        order = in_stream_order(held)
        in_order = jnp.take_along_axis(jnp.where(held.valid, held.noted, 0.0), order, axis=2)
        start, combine = (0.0, jax.lax.add) if self.pool == "mean" else (-jnp.inf, jax.lax.max)
        pooled = jax.lax.reduce_window(in_order, start, combine, (1, 1, self.kernel), (1, 1, 1), "SAME")
        return jnp.take_along_axis(pooled, jnp.argsort(order, axis=2), axis=2)


def in_stream_order(held: Held) -> Int32[Array, "B K S"]:
    """Slots by the age of their tokens, oldest first, and behind them those that hold none."""
    age = (held.now[:, None, None] - held.position).astype(jnp.int32)
    place = jnp.broadcast_to(jnp.where(held.valid, -age, jnp.iinfo(jnp.int32).max), held.k.shape[:3])
    return jnp.argsort(place, axis=2, stable=True).astype(jnp.int32)
