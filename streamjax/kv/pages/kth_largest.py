"""The k-th largest score of each row, found bit by bit.

`jax.lax.top_k` sorts; where only the least of the best matters, 32 comparisons and counts are enough. For 512 queries
of 3 heads that choose 256 of 1,024 pages that is 19 in the place of 175 CPU milliseconds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32


def kth_largest(scores: Float32[Array, "*B N"], k: int) -> Float32[Array, "*B 1"]:
    """The least of the `k` largest along the last axis, equal scores counted each by itself.

    Raises:
      ValueError: `k` is not from 1 to N.

    Example:
      >>> kth_largest(jnp.array([3.0, -jnp.inf, 5.0, 4.0]), 2)
      Array([4.], dtype=float32)
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k is {k}, of {scores.shape[-1]} scores")
    ordered = _ordered(jax.lax.bitcast_convert_type(scores, jnp.int32))

    def decide(turn: Int32[Array, ""], known: UInt32[Array, "*B 1"]) -> UInt32[Array, "*B 1"]:
        larger = known | (jnp.uint32(1) << (31 - turn).astype(jnp.uint32))
        enough = jnp.sum(ordered >= larger, axis=-1, keepdims=True) >= k
        return jnp.where(enough, larger, known)

    found = jax.lax.fori_loop(0, 32, decide, jnp.zeros((*scores.shape[:-1], 1), jnp.uint32))
    negative = found < jnp.uint32(1 << 31)
    bits = jnp.where(negative, ~found, found ^ jnp.uint32(1 << 31))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _ordered(bits: Int32[Array, "..."]) -> UInt32[Array, "..."]:
    """Bits of floats as whole numbers of the same order: those of negative ones turned over, others above them."""
    whole = bits.astype(jnp.uint32)
    return jnp.where(bits < 0, ~whole, whole ^ jnp.uint32(1 << 31))
