"""`LagKV`: tokens that stand out from those that follow them stay (Liang et al., 2504.04704)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import accumulator
from streamjax.field_checks import Size, check_fields
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

    def __post_init__(self) -> None:
        check_fields(self)

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        assert held.note is not None
        there = jnp.broadcast_to(held.valid, held.note.shape)
        fresh, waiting = there & (held.note == 0), there & jnp.isinf(held.note)
        of_keys, of_values = (_worth(x, waiting, _range(x, fresh)) for x in (held.k, held.values))
        ranked = jnp.where(fresh, jnp.inf, jnp.where(waiting, _ranked(of_keys + of_values, waiting), held.note))
        # without a block to measure by they go on waiting
        return jnp.where(waiting & ~fresh.any(axis=2, keepdims=True), jnp.inf, ranked)

    def rank_all(self, held: Held) -> Float[Array, "B K S"]:
        # Blocks begin with the first token that competes: what stays in front, such as sinks, is in none of them.
        slots, first = held.k.shape[2], jnp.argmax(held.valid, axis=2, keepdims=True)
        index = jnp.arange(slots)
        turned = held._replace(
            k=_turned(held.k, index + first), v=_turned(held.v, index + first), valid=_turned(held.valid, index + first)
        )
        return _turned(self._rank_from_start(turned), index - first)

    def _rank_from_start(self, held: Held) -> Float[Array, "B K S"]:
        slots = held.k.shape[2]
        blocks = -(-slots // self.lag)

        def cut(x: Array) -> Array:
            x = jnp.pad(x, [(0, blocks * self.lag - slots if axis == 2 else 0) for axis in range(x.ndim)])
            return rearrange(x, "b k (n s) ... -> (b n) k s ...", n=blocks)

        there = cut(jnp.broadcast_to(held.valid, held.k.shape[:3]))

        def following(x: Array) -> Array:
            whole = rearrange(x, "(b n) ... -> b n ...", n=blocks)
            return rearrange(jnp.roll(whole, -1, axis=1), "b n ... -> (b n) ...")

        of_keys, of_values = (
            _worth(mine, there, tuple(following(edge) for edge in _range(mine, there)))
            for mine in (cut(held.k), cut(held.values))
        )
        ranked = rearrange(_ranked(of_keys + of_values, there), "(b n) k s -> b k (n s)", n=blocks)[:, :, :slots]
        # a block is measured where the next one is whole; those behind it stay
        index, count = jnp.arange(slots), jnp.sum(held.valid, axis=2, keepdims=True)
        return jnp.where((index // self.lag + 2) * self.lag <= count, ranked, jnp.inf)


def _turned(x: Array, index: Int32[Array, "B #K S"]) -> Array:
    """`x` [B, K, S, ...] with its places along S taken from `index`, modulo S."""
    index = jnp.broadcast_to(index % index.shape[2], (*x.shape[:2], index.shape[2]))
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 3)), axis=2)


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
