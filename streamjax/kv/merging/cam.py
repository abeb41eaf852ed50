"""`IntoFollowing`: values alone, into the kept tokens that follow, by a draw (CaM, Zhang et al., ICML 2024)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.partial import accumulator
from streamjax.attention.rotary import Rotary
from streamjax.field_checks import Size
from streamjax.kv.merging.merge import Merge, Side
from streamjax.kv.query import State
from streamjax.kv.scores.random_choice import hashed


@dataclasses.dataclass(frozen=True)
class IntoFollowing(Merge):
    """The value of a token that leaves is added to those of the next `count` kept tokens, a `count`th of it to each.

    It happens with the probability of the token's worth over the mean worth of those that follow, so that a token that
    got little attention is dropped. Keys stay. The draw is a hash of position, head and seed: the same however the
    stream is cut. A token that nothing follows is dropped.
    """

    count: Size = 32
    seed: Size = 1

    def merged(self, stays: Side, leaves: Side, memory: State, rotary: Rotary | None) -> tuple[Array, Array, State]:
        if not stays.v.shape[-1]:
            raise ValueError("IntoFollowing merges values, and in this layer keys are values: take another rule")
        # an order that is right across the wrap of positions: how far each token is behind one that stays
        start = jnp.take_along_axis(stays.position, jnp.argmax(stays.valid, axis=2, keepdims=True), axis=2)
        apart = jnp.where(stays.valid, (stays.position - start).astype(jnp.int32), jnp.iinfo(jnp.int32).max)
        order = jnp.argsort(apart, axis=2, stable=True)
        place, in_order = jnp.argsort(order, axis=2), jnp.take_along_axis(apart, order, axis=2)
        mine = (leaves.position - start).astype(jnp.int32)
        first = jax.vmap(jax.vmap(lambda row, at: jnp.searchsorted(row, at, side="right")))(in_order, mine)
        there = jnp.sum(stays.valid, axis=2, keepdims=True)
        last = jnp.minimum(first + self.count, there)

        def sums(x: Array) -> Array:
            """Of the kept tokens in front of each place, in the order of the stream."""
            ordered = jnp.take_along_axis(jnp.where(stays.valid, x, 0.0), order, axis=2)
            return jnp.pad(jnp.cumsum(ordered, axis=2), ((0, 0), (0, 0), (1, 0)))

        worth = jnp.where(jnp.isfinite(stays.worth), jnp.maximum(stays.worth, 0.0), 0.0)
        before = sums(worth)
        around = jnp.take_along_axis(before, last, axis=2) - jnp.take_along_axis(before, first, axis=2)
        mean = around / jnp.maximum(last - first, 1)
        chance = jnp.where(mean > 0, leaves.worth / jnp.where(mean > 0, mean, 1.0), 0.0)
        drawn = leaves.valid & (last > first) & (hashed(leaves.position, self.seed) < chance)
        dtype = accumulator(stays.v.dtype)
        share = jnp.where(drawn[..., None], leaves.v.astype(dtype) / self.count, 0.0)

        def spread(first: Array, last: Array, share: Array) -> Array:
            steps = jnp.zeros((stays.k.shape[2] + 1, share.shape[-1]), dtype)
            return jnp.cumsum(steps.at[first].add(share).at[last].add(-share), axis=0)[:-1]

        more = jax.vmap(jax.vmap(spread))(first, last, share)
        more = jnp.take_along_axis(more, place[..., None], axis=2)
        return stays.k, (stays.v.astype(dtype) + more).astype(stays.v.dtype), memory
