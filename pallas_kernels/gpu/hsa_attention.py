"""Attention inside chosen pages on GPUs, in Triton (Ampere and later), as one differentiable function."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.choice_tiles import tiles
from pallas_kernels.flash_call import no_gradient
from pallas_kernels.gpu import hsa_kernels
from pallas_kernels.gpu.hsa_kernels import LEAST, Shape

MAX_WIDTH = 256
MOST = 64  # rows of a tile


def hsa_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K P S D"],
    v: Float[Array, "B K P S D"],
    chosen: Int32[Array, "B K C N"],
    weights: Float[Array, "B K C N"],
    *,
    scale: float,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B C H D"]:
    """`pallas_kernels.api.hsa_attention` on a GPU; see there for the arguments.

    block: rows of a tile, a power of two from 16.

    Raises:
      ValueError: heads wider than the kernel takes, or blocks of another size.
    """
    _, queries, heads, width = q.shape
    if width > MAX_WIDTH:
        raise ValueError(
            f"heads of width {width}: the Triton kernel takes {MAX_WIDTH} at most; use streamjax's XLA path"
        )
    if block is not None and (block < LEAST or block & (block - 1)):
        raise ValueError(f"tiles of {block} rows: use a power of two from {LEAST}")
    key_heads, pages, slots = k.shape[1:4]
    group, choices = heads // key_heads, chosen.shape[3]
    members = 1 << (group - 1).bit_length()
    rows = block or _tile_rows(queries * choices * members // pages)
    shape = Shape(scale, heads, group, queries, choices, pages, slots, width, max(rows // members, 1), interpret)
    if shape.rows < LEAST:
        shape = dataclasses.replace(shape, block=LEAST // members)
    return _attention(shape, q, k, v, weights.astype(jnp.float32), chosen)


def _tile_rows(each: int) -> int:
    """Of a tile, for pages that have `each` rows on average."""
    return min(max(1 << max(each - 1, 1).bit_length(), LEAST), MOST)


def _kernel_operands(shape: Shape, chosen: Array, **arrays: Array) -> dict[str, Array]:
    return hsa_kernels.hsa_operands(shape, tiles(chosen, shape.pages, shape.block), **arrays)


def _summed(shape: Shape, pairs: Float[Array, "B N C H *D"], chosen: Int32[Array, "B K C N"]) -> Array:
    """Over what a query chose; what was written where it chose none does not count."""
    some = jnp.repeat(jnp.transpose(chosen >= 0, (0, 3, 2, 1)), shape.group, axis=3)
    some = some.reshape(*some.shape, *[1] * (pairs.ndim - some.ndim))
    return jnp.sum(jnp.where(some, pairs, 0).astype(jnp.float32), axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(shape: Shape, q: Array, k: Array, v: Array, weights: Array, chosen: Array) -> Array:
    operands = _kernel_operands(shape, chosen, weights=jnp.swapaxes(weights, 2, 3), q=q, k=k, v=v)
    return _summed(shape, hsa_kernels.forward(shape, operands), chosen)


def _forward(shape: Shape, q: Array, k: Array, v: Array, weights: Array, chosen: Array) -> Any:
    return _attention(shape, q, k, v, weights, chosen), (q, k, v, weights, chosen)


def _backward(shape: Shape, saved: Any, d_out: Array) -> Any:
    q, k, v, weights, chosen = saved
    operands = _kernel_operands(
        shape, chosen, weights=jnp.swapaxes(weights, 2, 3), q=q, k=k, v=v, d_out=d_out.astype(q.dtype)
    )
    d_pairs, d_weights = hsa_kernels.query_gradients(shape, operands)
    d_q = _summed(shape, d_pairs, chosen).astype(q.dtype)
    d_k, d_v = hsa_kernels.key_gradients(shape, operands)
    d_weights = jnp.sum(d_weights.reshape(*d_weights.shape[:3], -1, shape.group), axis=4)
    d_weights = jnp.where(chosen < 0, 0.0, jnp.transpose(d_weights, (0, 3, 2, 1)))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), d_weights, no_gradient(chosen)


_attention.defvjp(_forward, _backward)
