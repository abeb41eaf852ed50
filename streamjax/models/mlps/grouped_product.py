"""A product of rows with one matrix a group: the work of a mixture of experts, once tokens are sorted by expert.

On TPU and GPU it is `jax.lax.ragged_dot`. XLA's CPU backend makes of that one product with all groups' matrices, of
rows that are zero outside of their own group, and a transposed copy of all matrices. So CPUs walk over tiles instead: a
tile is some rows of one group. Only the matrices of groups that have rows are read, each once for a few rows, as when a
single token is decoded. With 32 matrices of 512 x 512 on 2 cores, `ragged_dot` takes 24 ms for 8 rows and 290 ms for
1,024, the tiles 0.6 ms and 17 ms. Matrices gathered for each row are as fast at 8 rows and 13 times slower at 64.

TPUs take the tiles where there are few rows, as when tokens are decoded (64 streams of DeepSeek-V2-Lite: 2.2 times the
bytes that a step must read, for 3.0; benchmarks.models.experts_on_tpu). Their `ragged_dot` skips blocks of rows that
are not a group's, but reads the matrix of every group, rows or none (the compiled schedule walks all groups). And it
wants `D` and `F` next to each other in memory: gate and up projections, `[X, D, 2, F]`, are copied for it, all experts'
at each call. A tile's one matrix is read into fast memory and turned there.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import accumulator
from streamjax.models.quantisation import QuantisedWeight

_FEW = 16  # rows a group on the mean: up to here TPUs read matrices one by one, each once
_LEAST, _MOST = 8, 64  # rows of a tile: fewer cost more steps, more are read for nothing where groups are small
_ROWS = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])  # w transposed
_GROUPS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


@jax.custom_vjp
def grouped_product(
    rows: Float[Array, "N D"], weights: Float[Array, "X D ..."] | QuantisedWeight, sizes: Int32[Array, " X"]
) -> Float[Array, "N ..."]:
    """`rows[i] @ weights[group of i]`, where the first `sizes[0]` rows are group 0, the next `sizes[1]` group 1, ...

    Args:
      rows: sorted by group.
      weights: a matrix a group, its columns in one dimension or in several; cast to the dtype of the rows.
        Quantised ones get no gradient.
      sizes: rows of each group. Rows behind the last group's give 0.
    """
    return _product(rows, weights, sizes, False)


def _forward(rows: Array, weights: Array | QuantisedWeight, sizes: Array) -> tuple[Array, tuple[Any, ...]]:
    return _product(rows, weights, sizes, False), (rows, weights, sizes)


def _backward(saved: tuple[Any, ...], cotangent: Array) -> tuple[Array, Array | None, None]:
    rows, weights, sizes = saved
    cotangent = cotangent.reshape(len(rows), math.prod(weights.shape[2:]))
    if isinstance(weights, QuantisedWeight):
        return _product(cotangent, weights, sizes, True), None, None
    outer = jax.lax.platform_dependent(rows, cotangent, sizes, cpu=_tiled_outer, default=_ragged_outer)
    return _product(cotangent, weights, sizes, True), outer.astype(weights.dtype).reshape(weights.shape), None


grouped_product.defvjp(_forward, _backward)


def _product(rows: Array, weights: Array | QuantisedWeight, sizes: Array, transposed: bool) -> Array:
    """The product with each matrix, or of rows in one dimension with its transpose."""
    tiled, ragged = (partial(f, transposed=transposed) for f in (_tiled, _ragged))
    few = len(rows) <= _FEW * weights.shape[0]
    y = jax.lax.platform_dependent(rows, weights, sizes, cpu=tiled, tpu=tiled if few else ragged, default=ragged)
    return y if transposed else y.reshape(len(rows), *weights.shape[2:])


def _ragged(rows: Array, weights: Array | QuantisedWeight, sizes: Array, transposed: bool) -> Array:
    weights, dtype = weights.astype(rows.dtype).reshape(*weights.shape[:2], -1), accumulator(rows.dtype)
    if transposed:
        y = jax.lax.ragged_dot_general(rows, weights, sizes, _ROWS, preferred_element_type=dtype)
    else:
        y = jax.lax.ragged_dot(rows, weights, sizes, preferred_element_type=dtype)
    return y.astype(rows.dtype)


def _ragged_outer(rows: Array, cotangent: Array, sizes: Array) -> Array:
    dtype = accumulator(rows.dtype)
    return jax.lax.ragged_dot_general(rows, cotangent, sizes, _GROUPS, preferred_element_type=dtype)


class _Tiles:
    """Rows in blocks of a fixed size, each of which is one tile for every group that has rows in it."""

    def __init__(self, count: int, sizes: Int32[Array, " X"]):
        usual = max(1, count // len(sizes))
        self.block = min(max(_LEAST, 1 << (usual - 1).bit_length()), _MOST, max(1, count))
        self.padding = max(1, -(-count // self.block)) * self.block - count
        self.ends = jnp.cumsum(sizes)
        self.starts = self.ends - sizes
        self.first = self.starts // self.block  # block of a group's first row
        blocks = jnp.where(sizes > 0, (self.ends - 1) // self.block - self.first + 1, 0)
        self.before = jnp.cumsum(blocks)
        self.offset = self.before - blocks

    @property
    def count(self) -> Array:
        return self.before[-1]

    def pad(self, rows: Array) -> Array:
        return jnp.pad(rows, ((0, self.padding), (0, 0)))

    def group_of(self, tile: Array) -> tuple[Array, Array, Array]:
        """The group of a tile, its first row, and which rows of its block [block, 1] are the group's."""
        group = jnp.searchsorted(self.before, tile, side="right")
        start = (self.first[group] + tile - self.offset[group]) * self.block
        places = start + jnp.arange(self.block, dtype=start.dtype)
        return group, start, ((places >= self.starts[group]) & (places < self.ends[group]))[:, None]

    def block_at(self, padded: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(padded, start, self.block)


def _tiled(rows: Array, weights: Array | QuantisedWeight, sizes: Array, transposed: bool) -> Array:
    tiles = _Tiles(len(rows), sizes)
    padded = tiles.pad(rows)
    depth, axis = weights.shape[1], 1 if transposed else 0
    width = depth if transposed else math.prod(weights.shape[2:])

    def add(tile: Array, out: Array) -> Array:
        group, start, own = tiles.group_of(tile)
        matrix = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, group, keepdims=False), weights)
        matrix = matrix.astype(rows.dtype).reshape(depth, -1)
        block = jnp.where(own, tiles.block_at(padded, start), 0)
        dims = (((1,), (axis,)), ((), ()))
        y = jax.lax.dot_general(block, matrix, dims, preferred_element_type=accumulator(rows.dtype))
        return jax.lax.dynamic_update_slice_in_dim(out, tiles.block_at(out, start) + y.astype(out.dtype), start, 0)

    out = jnp.zeros((len(padded), width), rows.dtype)
    return jax.lax.fori_loop(0, tiles.count, add, out)[: len(rows)]


def _tiled_outer(rows: Array, cotangent: Array, sizes: Array) -> Array:
    tiles = _Tiles(len(rows), sizes)
    rows, cotangent = tiles.pad(rows), tiles.pad(cotangent)
    dtype = accumulator(rows.dtype)

    def add(tile: Array, out: Array) -> Array:
        group, start, own = tiles.group_of(tile)
        block = jnp.where(own, tiles.block_at(rows, start), 0)
        dims = (((0,), (0,)), ((), ()))
        y = jax.lax.dot_general(block, tiles.block_at(cotangent, start), dims, preferred_element_type=dtype)
        old = jax.lax.dynamic_index_in_dim(out, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(out, old + y, group, 0)

    out = jnp.zeros((len(sizes), rows.shape[1], cotangent.shape[1]), dtype)
    return jax.lax.fori_loop(0, tiles.count, add, out)
