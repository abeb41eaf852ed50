"""FlashAttention backwards for TPUs: gradients of queries, keys and values, and of sinks.

Two kernels, as in FlashAttention-2 (2307.08691). `query_gradients` holds queries while keys pass, on the forward pass's
grid; it also makes the gradients of the sinks' keys, whose operand is at hand there. `key_gradients` holds keys while
queries pass, with logits transposed, so that a query's log-sum-exp lies along lanes, as it is stored, and no product
needs a transposed operand. Both make the weights again from the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_ranges import Ranges
from pallas_kernels.tile_logits import LOG2E, MASKED, Settings, logits, sink_visible, tile_mask
from pallas_kernels.tpu.flash_forward import VMEM_BYTES
from pallas_kernels.tpu.flash_operands import Operands, key_outer, query_outer, scalars
from pallas_kernels.tpu.schedule import Grid
from pallas_kernels.tpu.tiles import LANES, NN, NT, SUBLANES, TN, across, dot, pieces, when_runs

BY_QUERY = ("q", "d_out", "k", "v", "lse", "shift", "sink_k", "sink_v", "slopes", "query_rows", "key_columns",
            "sink_columns")  # fmt: skip
BY_KEY = ("q", "d_out", "k", "v", "lse", "shift", "slopes", "query_columns", "key_rows", "d_k", "d_v")


def query_gradients(
    settings: Settings, ranges: Ranges, operands: Operands, offset: Any, interpret: Any = False, row: Any = 0
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Float32 gradients of q, [B, H, T, D], and of sink_k and sink_v for each query head, [B, H, N, D], or None."""
    batch, heads, length, width = operands["q"].shape
    grid = Grid.make(ranges, offset)
    specs = query_outer(grid, operands, settings.group)
    names = [name for name in BY_QUERY if name in operands]
    state = pltpu.VMEM((ranges.block_q, LANES), jnp.float32)
    out_specs, shapes = [specs["q"]], [(batch, heads, length, width)]
    if settings.sinks:
        sinks = operands["sink_k"].shape[2]
        out_specs += [pl.BlockSpec((None, None, sinks, width), lambda b, h, r, n, o: (b, h, 0, 0))] * 2
        shapes += [(batch, heads, sinks, width)] * 2
    call = pl.pallas_call(
        partial(_query_kernel, settings, grid, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, grid.rows, grid.width),
            in_specs=[specs[name] for name in names],
            out_specs=out_specs,
            scratch_shapes=[state, state, pltpu.VMEM((ranges.block_q, width), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="flash_query_gradients",
    )
    found = call(scalars(offset, row), *(operands[name] for name in names))
    return (found[0], found[1], found[2]) if settings.sinks else (found[0], None, None)


def _query_kernel(settings: Settings, grid: Grid, names: list[str], offset_ref: Any, *refs: Any) -> None:
    read = dict(zip(names, refs, strict=False))
    d_q, *d_sinks = refs[len(names) : -3]
    lse, shift, sums = refs[-3:]
    offset, ranges = offset_ref[0], grid.ranges
    step = grid.step(pl.program_id(2), pl.program_id(3), offset)
    query = offset + step.outer * ranges.block_q
    slope = read["slopes"][pl.program_id(1)] if settings.alibi else None

    def gradient(at: Any, k: jax.Array, v: jax.Array, key: Any, masked: bool) -> jax.Array:
        """Of the scaled dot products of some queries and a block of keys."""
        scores, derivative = logits(settings, dot(read["q"][at], k, NT), query + at.start, key, slope)
        if masked:
            segments = (read["query_rows"][at][:, :1], read["key_columns"][:1]) if settings.segmented else None
            scores = jnp.where(tile_mask(settings, scores.shape, query + at.start, key, segments), scores, MASKED)
        weights = jnp.exp2((scores - across(lse[at], scores.shape[1])) * settings.exact)
        d_scores = weights * (dot(read["d_out"][at], v, NT) + across(shift[at], scores.shape[1]))
        return d_scores if derivative is None else d_scores * derivative

    @pl.when(step.first)
    def _() -> None:
        lse[...] = _column(read["lse"][...] * (LOG2E / settings.exact))
        shift[...] = _column(read["shift"][...])
        sums[...] = jnp.zeros_like(sums)

    if settings.sinks:
        assert settings.window is not None

        @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
        def _() -> None:
            for ref in d_sinks:
                ref[...] = jnp.zeros_like(ref)

        @pl.when(step.first & (query + ranges.block_q > settings.window))
        def _() -> None:
            count = -(-settings.sinks // (2 * SUBLANES)) * 2 * SUBLANES  # sinks along sublanes: few of them
            rows = pl.ds(0, count)
            k, v, q, d_out = read["sink_k"][rows], read["sink_v"][rows], read["q"][...], read["d_out"][...]
            segments = None
            if settings.segmented:
                by_lane, by_row = jnp.transpose(read["query_rows"][...]), jnp.transpose(read["sink_columns"][...])
                segments = by_lane[:1], by_row[:count, :1]
            scores, derivative = logits(settings, dot(k, q, NT), query, 0, slope, transposed=True)
            seen = sink_visible(settings, scores.shape, query, 0, segments, transposed=True)
            scores = jnp.where(seen, scores, MASKED)
            weights = jnp.exp2((scores - read["lse"][...] * (LOG2E / settings.exact)) * settings.exact)
            d_scores = weights * (dot(v, d_out, NT) + read["shift"][...])
            d_scores = (d_scores if derivative is None else d_scores * derivative).astype(k.dtype)
            sums[...] += dot(d_scores, k, TN)
            d_sinks[0][rows] += dot(d_scores, q, NN) * settings.scale
            d_sinks[1][rows] += dot(weights.astype(v.dtype), d_out, NN)

    def tile(masked: bool) -> None:
        k, v, key = read["k"][...], read["v"][...], step.inner * ranges.block_k
        for at, _ in pieces(ranges.block_q, query, masked):
            sums[at] += dot(gradient(at, k, v, key, masked).astype(k.dtype), k, NN)

    when_runs(settings, ranges, step.runs, step.outer, step.inner, offset, tile)

    @pl.when(step.last)
    def _() -> None:
        d_q[...] = sums[...] * settings.scale


def key_gradients(
    settings: Settings, ranges: Ranges, operands: Operands, offset: Any, interpret: Any = False, row: Any = 0
) -> tuple[jax.Array, jax.Array]:
    """Float32 gradients of k and v, [1, B, K, S, D], from all but the sinks beyond the window.

    With sums so far among the operands they are added to those, in place and in their dtype: only the blocks that
    meet queries are read and written, of the row that is meant.
    """
    _, batch, heads, length, width = operands["k"].shape
    sums_so_far = [operands[name] for name in ("d_k", "d_v") if name in operands]
    grid = Grid.make(ranges, offset, idle=not sums_so_far)
    specs = key_outer(grid, operands, settings.group)
    names = [name for name in BY_KEY if name in operands]
    sums = pltpu.VMEM((ranges.block_k, width), jnp.float32)
    call = pl.pallas_call(
        partial(_key_kernel, settings, grid, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, grid.rows, grid.width, settings.group),
            in_specs=[specs[name] for name in names],
            out_specs=[specs["k"], specs["v"]],
            scratch_shapes=[sums, sums],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sums_so_far]
        or [jax.ShapeDtypeStruct((1, batch, heads, length, width), jnp.float32)] * 2,
        input_output_aliases={len(names) - 1: 0, len(names): 1} if sums_so_far else {},  # behind the scalars
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=interpret,
        name="flash_key_gradients",
    )
    d_k, d_v = call(scalars(offset, row), *(operands[name] for name in names))
    return d_k, d_v


def _key_kernel(settings: Settings, grid: Grid, names: list[str], offset_ref: Any, *refs: Any) -> None:
    read: Mapping[str, Any] = dict(zip(names, refs, strict=False))
    d_k, d_v, sums_k, sums_v = refs[len(names) :]
    offset, ranges = offset_ref[0], grid.ranges
    step, member = grid.step(pl.program_id(2), pl.program_id(3), offset), pl.program_id(4)
    first_key = step.outer * ranges.block_k
    slope = read["slopes"][pl.program_id(1) * settings.group + member] if settings.alibi else None

    @pl.when(step.first & (member == 0))
    def _() -> None:
        sums_k[...] = jnp.zeros_like(sums_k)
        sums_v[...] = jnp.zeros_like(sums_v)

    def tile(masked: bool) -> None:
        q, d_out, query = read["q"][...], read["d_out"][...], offset + step.inner * ranges.block_q
        line_lse, line_shift = read["lse"][...] * (LOG2E / settings.exact), read["shift"][...]
        for at, key in pieces(ranges.block_k, first_key, masked):
            scores, derivative = logits(settings, dot(read["k"][at], q, NT), query, key, slope, transposed=True)
            if masked:
                segments = (read["query_columns"][:1], read["key_rows"][at][:, :1]) if settings.segmented else None
                scores = jnp.where(tile_mask(settings, scores.shape, query, key, segments, True), scores, MASKED)
            d_weights = dot(read["v"][at], d_out, NT)  # before the weights: fewer bundles so
            weights = jnp.exp2((scores - line_lse) * settings.exact)
            d_scores = weights * (d_weights + line_shift)
            sums_v[at] += dot(weights.astype(d_out.dtype), d_out, NN)
            if derivative is not None:
                d_scores *= derivative
            sums_k[at] += dot(d_scores.astype(q.dtype), q, NN)

    when_runs(settings, ranges, step.runs, step.inner, step.outer, offset, tile)

    @pl.when(step.last & (member == settings.group - 1))
    def _() -> None:
        for name, ref, sums in (("d_k", d_k, sums_k[...] * settings.scale), ("d_v", d_v, sums_v[...])):
            ref[...] = (read[name][...] + sums if name in read else sums).astype(ref.dtype)


def _column(line: jax.Array) -> jax.Array:
    """[1, n] as [n, LANES] of equal columns."""
    return jnp.transpose(jnp.broadcast_to(line, (LANES, line.shape[1])))
