"""Arrays as the TPU kernels of attention read them, and the blocks in which they do.

Operands go by name, so that a kernel has those that its pattern needs and no other:
q, d_out: [B, H, T, D]. k, v: [R, B, K, S, D], of which one of R rows is meant; d_k, d_v: sums so far, likewise.
sink_k, sink_v: [B, K, N, D], the first keys, N a multiple of LANES. lse, shift: [B, H, 1, T]. slopes: [H]. Segment ids
along sublanes, query_rows and key_rows: [B, n, LANES], and along lanes, query_columns, key_columns and sink_columns:
[B, SUBLANES, n]. T and S are padded to whole blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_ranges import divide
from pallas_kernels.tpu.schedule import Grid
from pallas_kernels.tpu.tiles import LANES, SUBLANES

Operands = Mapping[str, jax.Array]


def along_sublanes(ids: jax.Array) -> jax.Array:
    """[B, n] along sublanes."""
    return jnp.broadcast_to(ids[:, :, None], (*ids.shape, LANES))


def along_lanes(ids: jax.Array) -> jax.Array:
    """[B, n] along lanes."""
    return jnp.broadcast_to(ids[:, None], (ids.shape[0], SUBLANES, ids.shape[1]))


def scalars(offset: Any, row: Any) -> jax.Array:
    """What is prefetched: the index of the first query, and the row of the keys."""
    return jnp.stack([jnp.asarray(offset, jnp.int32), jnp.asarray(row, jnp.int32)])


def query_outer(grid: Grid, operands: Operands, group: int) -> dict[str, Any]:
    """Blocks of the operands in a grid (batch, query head, row, step), queries outside.

    The scalars that are prefetched are the index of the first query, and the row of the keys.
    """
    block_q, block_k, width = grid.ranges.block_q, grid.ranges.block_k, operands["q"].shape[-1]
    sinks = operands["sink_k"].shape[2] if "sink_k" in operands else 0

    def outer(row: Any, n: Any, offset: Any) -> Any:
        return grid.step(row, n, offset[0]).outer

    def inner(row: Any, n: Any, offset: Any) -> Any:
        return grid.step(row, n, offset[0]).inner

    query = pl.BlockSpec((None, None, block_q, width), lambda b, h, r, n, o: (b, h, outer(r, n, o), 0))
    key = pl.BlockSpec(
        (None, None, None, block_k, width), lambda b, h, r, n, o: (o[1], b, divide(h, group), inner(r, n, o), 0)
    )
    sink = pl.BlockSpec((None, None, sinks, width), lambda b, h, r, n, o: (b, divide(h, group), 0, 0))
    line = pl.BlockSpec((None, None, 1, block_q), lambda b, h, r, n, o: (b, h, 0, outer(r, n, o)))
    return {
        "q": query,
        "d_out": query,
        "out": query,
        "k": key,
        "v": key,
        "sink_k": sink,
        "sink_v": sink,
        "lse": line,
        "shift": line,
        "slopes": pl.BlockSpec(memory_space=pltpu.SMEM),
        "query_rows": pl.BlockSpec((None, block_q, LANES), lambda b, h, r, n, o: (b, outer(r, n, o), 0)),
        "key_columns": pl.BlockSpec((None, SUBLANES, block_k), lambda b, h, r, n, o: (b, 0, inner(r, n, o))),
        "sink_columns": pl.BlockSpec((None, SUBLANES, sinks), lambda b, h, r, n, o: (b, 0, 0)),
    }


def key_outer(grid: Grid, operands: Operands, group: int) -> dict[str, Any]:
    """Blocks of the operands in a grid (batch, key head, row, step, member of the group), keys outside."""
    block_q, block_k, width = grid.ranges.block_q, grid.ranges.block_k, operands["q"].shape[-1]

    def outer(row: Any, n: Any, offset: Any) -> Any:
        return grid.step(row, n, offset[0]).outer

    def inner(row: Any, n: Any, offset: Any) -> Any:
        return grid.step(row, n, offset[0]).inner

    query = pl.BlockSpec((None, None, block_q, width), lambda b, h, r, n, g, o: (b, h * group + g, inner(r, n, o), 0))
    key = pl.BlockSpec((None, None, None, block_k, width), lambda b, h, r, n, g, o: (o[1], b, h, outer(r, n, o), 0))
    line = pl.BlockSpec((None, None, 1, block_q), lambda b, h, r, n, g, o: (b, h * group + g, 0, inner(r, n, o)))
    return {
        "q": query,
        "d_out": query,
        "k": key,
        "v": key,
        "d_k": key,
        "d_v": key,
        "lse": line,
        "shift": line,
        "slopes": pl.BlockSpec(memory_space=pltpu.SMEM),
        "query_columns": pl.BlockSpec((None, SUBLANES, block_q), lambda b, h, r, n, g, o: (b, 0, inner(r, n, o))),
        "key_rows": pl.BlockSpec((None, block_k, LANES), lambda b, h, r, n, g, o: (b, outer(r, n, o), 0)),
    }
