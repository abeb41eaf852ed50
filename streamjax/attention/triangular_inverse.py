"""The inverse of 1 + L of many small L that are strictly lower triangular: what a delta rule solves in every block.

By halves: the inverse of `[[A, 0], [B, D]]` has `-D^-1 B A^-1` below the inverses of A and D. Products of matrices do
most of it, which every backend has. LAPACK's solver, which XLA calls on CPUs, has threads of its own that wait for
those of XLA.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_ROWS = 8  # of the blocks that are inverted row by row; with more the loop takes longer than all products


@jax.custom_jvp
def unit_lower_inverse(below: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """The inverse of 1 + `below`; what `below` has on and above its diagonal must be 0.

    >>> unit_lower_inverse(jnp.array([[0.0, 0.0], [2.0, 0.0]]))
    Array([[ 1.,  0.],
           [-2.,  1.]], dtype=float32)
    """
    size = below.shape[-1]
    if size <= _ROWS:
        return _by_rows(below)
    if size % 2:
        return unit_lower_inverse(jnp.pad(below, [(0, 0)] * (below.ndim - 2) + [(0, 1)] * 2))[..., :size, :size]
    half = size // 2
    # Both halves as one batch.
    top, bottom = unit_lower_inverse(jnp.stack((below[..., :half, :half], below[..., half:, half:])))
    corner = -jnp.matmul(bottom, jnp.matmul(below[..., half:, :half], top))
    upper = jnp.concatenate((top, jnp.zeros_like(top)), axis=-1)
    return jnp.concatenate((upper, jnp.concatenate((corner, bottom), axis=-1)), axis=-2)


def _by_rows(below: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """A row is its row of the unit matrix, less the rows in front of it as `below` weighs them."""
    unit = jnp.eye(below.shape[-1], dtype=below.dtype)

    def row(i: Array, found: Array) -> Array:
        weights = jax.lax.dynamic_index_in_dim(below, i, -2, keepdims=False)
        new = unit[i] - jnp.sum(weights[..., None] * found, axis=-2)
        return jax.lax.dynamic_update_index_in_dim(found, new, i, -2)

    return jax.lax.fori_loop(0, below.shape[-1], row, jnp.zeros_like(below))


@unit_lower_inverse.defjvp
def _derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(*primals)
    return inverse, -jnp.matmul(inverse, jnp.matmul(tangents[0], inverse))
