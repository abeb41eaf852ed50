"""Stretches of neighbouring tokens: what is summed over each of those that compete."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.kv.scores.score import Held


def over_stretches(
    x: Float[Array, "B K S"], held: Held, size: int, best: int | None = None
) -> tuple[Float[Array, "B K S"], Float[Array, "B K S"]]:
    """For each token, the sum of `x` over its stretch, and how many tokens of it are there.

    Positions size * i to size * i + size - 1 are a stretch. Of each only the `best` with the largest `x` count, where
    that is a number. Slots that hold nothing belong to none.
    """
    there = jnp.broadcast_to(held.valid, x.shape)
    number = jnp.where(there, jnp.broadcast_to(held.position // size, x.shape), jnp.uint32(2**32 - 1))
    slot = jnp.broadcast_to(jnp.arange(x.shape[2], dtype=jnp.int32), x.shape)
    # a stretch side by side, its largest numbers first; which stretch comes first does not matter
    number, gone, negative, slot = jax.lax.sort((number, (~there).astype(jnp.int32), -x, slot), num_keys=3)
    begins = jnp.diff(number, axis=2, prepend=number[..., :1] ^ 1) != 0
    begins |= jnp.diff(gone, axis=2, prepend=gone[..., :1]) != 0
    place = jnp.arange(x.shape[2]) - jax.lax.cummax(jnp.where(begins, jnp.arange(x.shape[2]), 0), axis=2)
    counts = (gone == 0) & (place < (best or x.shape[2]))
    which = jnp.cumsum(begins, axis=2) - 1

    def total(values: Float[Array, " S"], which: Array) -> Float[Array, " S"]:
        return jax.ops.segment_sum(values, which, values.shape[0], indices_are_sorted=True)[which]

    back = jnp.argsort(slot, axis=2)
    found = (jnp.where(counts, value, 0.0) for value in (-negative, jnp.ones_like(x)))
    sums, sizes = (jnp.take_along_axis(jax.vmap(jax.vmap(total))(each, which), back, axis=2) for each in found)
    return sums, sizes
