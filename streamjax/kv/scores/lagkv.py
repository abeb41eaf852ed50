"""`LagKV`: tokens that stand out from those that follow them stay (Liang et al., 2504.04704)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.field_checks import Size
from streamjax.kv.scores.blocks import Blocks, next_is_whole
from streamjax.kv.scores.score import Held, Score


@dataclasses.dataclass(frozen=True)
class LagKV(Score):
    """Each block of tokens is measured by the next one: by the range of each of its keys' and values' channels.

    A token's worth is how much its channels vary once they are scaled to that range, a softmax over its block, and what
    counts is its rank within the block, so that every block keeps the same share. In a stream a block is what comes
    between two choices; the newest waits for its measure and stays. `lag`: tokens a block where all compete at once.
    """

    remembers: ClassVar[bool] = True

    lag: Size = 128

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        fresh, waiting = held.fresh, held.there & jnp.isinf(held.noted)
        keys, values = (_worth(x, waiting, _range(x, fresh)) for x in (held.k, held.values))
        ranked = jnp.where(fresh, jnp.inf, jnp.where(waiting, _ranked(keys + values, waiting), held.noted))
        # without a block to measure by they go on waiting
        return jnp.where(waiting & ~fresh.any(axis=2, keepdims=True), jnp.inf, ranked)

    def rank_all(self, held: Held) -> Float[Array, "B K S"]:
        blocks = Blocks.of(held, self.lag)
        there, *both = map(blocks.cut, (held.there, held.k, held.values))
        keys, values = (_worth(x, there, tuple(map(blocks.following, _range(x, there)))) for x in both)
        # a block is measured where the next one is whole; those behind it stay
        return blocks.joined(jnp.where(next_is_whole(blocks, there), _ranked(keys + values, there), jnp.inf))


def _range(x: Float[Array, "B K S D"], some: Bool[Array, "B K S"]) -> tuple[Array, Array]:
    """The smallest and the largest value of each channel."""
    x, some = x.astype(accumulator(x.dtype)), some[..., None]
    return (
        jnp.min(jnp.where(some, x, jnp.inf), axis=2, keepdims=True),
        jnp.max(jnp.where(some, x, -jnp.inf), axis=2, keepdims=True),
    )


def _worth(x: Float[Array, "B K S D"], some: Bool[Array, "B K S"], edges: tuple[Array, ...]) -> Float[Array, "B K S"]:
    """How much the channels of these tokens vary on the scale that `edges` give each, as a softmax over them."""
    low, high = edges
    width = jnp.where(high > low, high - low, 1.0)
    scaled = (x.astype(low.dtype) - jnp.where(jnp.isfinite(low), low, 0.0)) / jnp.where(jnp.isfinite(width), width, 1.0)
    spread = jnp.std(scaled, axis=-1, ddof=min(1, x.shape[-1] - 1))
    return jax.nn.softmax(jnp.where(some, spread, -jnp.inf), axis=-1, where=some)


def _ranked(worth: Float[Array, "B K S"], some: Bool[Array, "B K S"]) -> Float[Array, "B K S"]:
    """The share of tokens that are worth less or the same: 1 for the best of them."""
    order = jnp.argsort(jnp.argsort(jnp.where(some, worth, -1.0), axis=2), axis=2)
    missing, count = (jnp.sum(x, axis=2, keepdims=True) for x in (~some, some))
    return (order - missing + 1) / jnp.maximum(count, 1).astype(jnp.float32)
