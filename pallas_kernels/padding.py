"""Whole blocks of arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def padded(x: jax.Array, axis: int, block: int) -> jax.Array:
    """`x` with zeros behind, to a multiple of `block`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths) if widths[axis][1] else x
