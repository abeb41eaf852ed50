"""FlashAttention backwards for GPUs, in Triton: gradients of queries, of keys and values, and of sinks.

`query_gradients` holds queries and walks keys, as the forward pass does. `key_gradients` holds keys and walks the
queries that see them inside the window. Sinks are seen by all later queries: one program for them would run long after
all others, so `sink_gradients` cuts the queries into shares, and the shares are summed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.block_ranges import Ranges, divide
from pallas_kernels.gpu.exponentials import MASKED, exp2, tanh
from pallas_kernels.gpu.flash_operands import (
    SINK_BLOCK,
    Operands,
    dot,
    key_spec,
    load,
    over_keys,
    over_sinks,
    specs,
    store,
)
from pallas_kernels.tile_logits import LOG2E, Settings, logits, sink_visible, tile_mask

SHARES = 64  # of the queries, for the sinks' gradients
BY_QUERY = ("offset", "q", "d_out", "k", "v", "lse", "shift", "slopes", "query_ids", "key_ids")


def query_gradients(settings: Settings, ranges: Ranges, operands: Operands) -> jax.Array:
    """Gradient of q, float32 [B, T, H, D]."""
    batch, length, heads, width = operands["q"].shape
    blocks = specs(settings, ranges, operands)
    names = [name for name in BY_QUERY if name in operands]
    call = pl.pallas_call(
        partial(_query_kernel, settings, ranges, names, width),
        grid=(ranges.blocks, batch, heads),
        in_specs=[blocks[name] for name in names],
        out_specs=blocks["q"],
        out_shape=jax.ShapeDtypeStruct((batch, length, heads, width), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=2),
        interpret=settings.interpreted,
        name="flash_query_gradients",
    )
    d_q: jax.Array = call(*(operands[name] for name in names))
    return d_q


def _query_kernel(settings: Settings, ranges: Ranges, names: list[str], width: int, *refs: Any) -> None:
    read = dict(zip(names, refs, strict=False))
    i, offset, d_q = pl.program_id(0), read["offset"][0], refs[-1]
    query = offset + i * ranges.block_q
    slope = read["slopes"][0] if settings.alibi else None
    q, d_out = (load(read[name], slice(None), width) for name in ("q", "d_out"))
    lse, shift = read["lse"][...] * LOG2E, read["shift"][...]
    ids = read["query_ids"][...][:, None] if settings.segmented else None

    def add(rows: Any, key: Any, mask: Any, sums: jax.Array) -> jax.Array:
        k, v = (load(read[name], rows, width) for name in ("k", "v"))
        squash = tanh(q.dtype, settings.interpreted)
        scores, derivative = logits(settings, dot(q, k.T), query, key, slope, tanh=squash)
        if mask is not None:
            segments = (ids, read["key_ids"][rows][None]) if settings.segmented else None
            scores = jnp.where(mask(settings, scores.shape, query, key, segments), scores, MASKED)
        weights = exp2(scores, settings.exact, lse[:, None], settings.interpreted)
        d_scores = weights * (dot(d_out, v.T) + shift[:, None])
        d_scores = d_scores if derivative is None else d_scores * derivative
        return sums + dot(d_scores.astype(k.dtype), k)

    def sinks(j: Any, sums: jax.Array) -> jax.Array:
        return add(pl.ds(j * SINK_BLOCK, SINK_BLOCK), j * SINK_BLOCK, sink_visible, sums)

    def keys(masked: bool, j: Any, sums: jax.Array) -> jax.Array:
        return add(pl.ds(j * ranges.block_k, ranges.block_k), j * ranges.block_k, tile_mask if masked else None, sums)

    sums = jnp.zeros((ranges.block_q, d_q.shape[-1]), jnp.float32)
    sums = over_keys(settings, ranges, i, offset, keys, over_sinks(settings, ranges, i, offset, sinks, sums))
    store(d_q, sums * settings.scale, width)


def key_gradients(settings: Settings, ranges: Ranges, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Gradients of k and v, float32 in their shape, from all but the sinks behind the window; `ranges` are transposed.

    With sums so far among the operands they are added to those, in place and in their dtype: blocks that no query sees
    are neither read nor written.
    """
    shape, width = operands["k"].shape, operands["k"].shape[-1]
    names, in_specs = _by_key(settings, operands, ranges.block_k, lambda j: j)
    block = key_spec(settings, ranges.block_k, pl.next_power_of_2(width), lambda j: j)
    sums = [name for name in ("d_k", "d_v") if name in operands]
    count = len(names)
    names, in_specs = names + sums, in_specs + [block] * len(sums)
    call = pl.pallas_call(
        partial(_key_kernel, settings, ranges, names, width),
        grid=(ranges.blocks, shape[0], shape[1 if settings.heads_first else 2]),
        in_specs=in_specs,
        out_specs=[block, block],
        out_shape=[
            jax.ShapeDtypeStruct(shape, operands[name].dtype if sums else jnp.float32) for name in ("d_k", "d_v")
        ],
        input_output_aliases={count: 0, count + 1: 1} if sums else {},
        compiler_params=plgpu.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=2),
        interpret=settings.interpreted,
        name="flash_key_gradients",
    )
    d_k, d_v = call(*(operands[name] for name in names))
    return d_k, d_v


def _by_key(
    settings: Settings, operands: Operands, size: int, block: Callable[[Any], Any]
) -> tuple[list[str], list[Any]]:
    """Operands for a grid (any, batch, key head): all queries of the group, and block `block(j)` of `size` keys."""
    group, queries, width = settings.group, operands["q"].shape[1], pl.next_power_of_2(operands["q"].shape[-1])
    query = pl.BlockSpec((None, queries, group, width), lambda j, b, h: (b, 0, h, 0))
    line = pl.BlockSpec((None, group, queries), lambda j, b, h: (b, h, 0))
    found = {
        "offset": pl.BlockSpec((1,), lambda j, b, h: (0,)),
        "q": query,
        "d_out": query,
        "k": key_spec(settings, size, width, block),
        "lse": line,
        "shift": line,
        "slopes": pl.BlockSpec((group,), lambda j, b, h: (h,)),
        "query_ids": pl.BlockSpec((None, queries), lambda j, b, h: (b, 0)),
        "key_ids": pl.BlockSpec((None, size), lambda j, b, h: (b, block(j))),
    }
    found["v"] = found["k"]
    names = [name for name in BY_QUERY if name in operands]
    return names, [found[name] for name in names]


def _pull(
    settings: Settings, read: Any, width: int, g: Any, rows: Any, query: Any, key: Any, mask: Any, carry: Any
) -> Any:
    """`carry` with what some queries of head g add to the gradients of the keys at hand."""
    sums_k, sums_v = carry
    k, v = (load(read[name], slice(None), width) for name in ("k", "v"))
    q, d_out = (load(read[name], rows, width, g) for name in ("q", "d_out"))
    slope = read["slopes"][g] if settings.alibi else None
    squash = tanh(q.dtype, settings.interpreted)
    scores, derivative = logits(settings, dot(k, q.T), query, key, slope, transposed=True, tanh=squash)
    if mask is not None:
        segments = (read["query_ids"][rows][None], read["key_ids"][...][:, None]) if settings.segmented else None
        scores = jnp.where(mask(settings, scores.shape, query, key, segments, transposed=True), scores, MASKED)
    lse = read["lse"][g, rows] * LOG2E
    weights = exp2(scores, settings.exact, lse[None], settings.interpreted)
    sums_v += dot(weights.astype(d_out.dtype), d_out)
    d_scores = weights * (dot(v, d_out.T) + read["shift"][g, rows][None])
    d_scores = d_scores if derivative is None else d_scores * derivative
    return sums_k + dot(d_scores.astype(q.dtype), q), sums_v


def _key_kernel(settings: Settings, ranges: Ranges, names: list[str], width: int, *refs: Any) -> None:
    read = dict(zip(names, refs, strict=False))
    d_k, d_v = refs[len(names) :]
    j, offset = pl.program_id(0), read["offset"][0]
    key, block = j * ranges.block_k, ranges.block_q
    low, high = ranges.range(j, offset)
    # The first block of queries that come after all keys, and the end of those that see all of them in their window.
    whole = jnp.clip(divide(jnp.maximum(key + ranges.block_k - 1 - offset, 0) + block - 1, block), low, high)
    stop = high
    if ranges.window is not None:
        stop = jnp.clip(divide(jnp.maximum(key + ranges.window - offset, 0), block), whole, high)
    if settings.ragged:
        stop = jnp.where(key + ranges.block_k > settings.keys, whole, stop)
    if settings.segmented:
        stop = whole

    def queries(g: Any, mask: Any, i: Any, carry: Any) -> Any:
        rows = pl.ds(i * block, block)
        return _pull(settings, read, width, g, rows, offset + i * block, key, mask, carry)

    def head(g: Any, carry: Any) -> Any:
        carry = lax.fori_loop(low, whole, partial(queries, g, tile_mask), carry)
        carry = lax.fori_loop(whole, stop, partial(queries, g, None), carry)
        return lax.fori_loop(stop, high, partial(queries, g, tile_mask), carry)

    def all_heads() -> None:
        zeros = jnp.zeros((ranges.block_k, d_k.shape[-1]), jnp.float32)
        sums_k, sums_v = lax.fori_loop(0, settings.group, head, (zeros, zeros))
        for name, ref, sums in (("d_k", d_k, sums_k * settings.scale), ("d_v", d_v, sums_v)):
            store(ref, load(read[name], slice(None), width) + sums if name in read else sums, width)

    if "d_k" in read:
        pl.when(low < high)(all_heads)
    else:
        all_heads()


def sink_gradients(settings: Settings, ranges: Ranges, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Gradients of the first keys and values as sinks, float32 [B, N, K, D], N a multiple of `SINK_BLOCK`."""
    batch, heads, width = operands["k"].shape[0], operands["q"].shape[2] // settings.group, operands["k"].shape[-1]
    blocks = -(-settings.sinks // SINK_BLOCK)
    padded = pl.next_power_of_2(width)
    names, in_specs = _by_key(settings, operands, SINK_BLOCK, lambda s: lax.rem(s, blocks))
    share = pl.BlockSpec((None, None, SINK_BLOCK, None, padded), lambda s, b, h: (
        lax.div(s, blocks), b, lax.rem(s, blocks), h, 0))  # fmt: skip
    call = pl.pallas_call(
        partial(_sink_kernel, settings, ranges, names, width, blocks),
        grid=(SHARES * blocks, batch, heads),
        in_specs=in_specs,
        out_specs=[share, share],
        out_shape=[jax.ShapeDtypeStruct((SHARES, batch, blocks * SINK_BLOCK, heads, width), jnp.float32)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=settings.interpreted,
        name="flash_sink_gradients",
    )
    d_k, d_v = call(*(operands[name] for name in names))
    return jnp.sum(d_k, axis=0), jnp.sum(d_v, axis=0)


def _sink_kernel(settings: Settings, ranges: Ranges, names: list[str], width: int, blocks: int, *refs: Any) -> None:
    read = dict(zip(names, refs, strict=False))
    d_k, d_v = refs[len(names) :]
    share, key = lax.div(pl.program_id(0), blocks), lax.rem(pl.program_id(0), blocks) * SINK_BLOCK
    offset, block, count = read["offset"][0], ranges.block_q, -(-ranges.queries // ranges.block_q)
    each = -(-count // SHARES)
    # Queries before index `window` have no sinks behind it.
    assert settings.window is not None
    early = divide(jnp.maximum(settings.window - offset, 0), block)
    low, high = jnp.maximum(share * each, early), jnp.minimum((share + 1) * each, count)

    def head(g: Any, carry: Any) -> Any:
        def queries(i: Any, carry: Any) -> Any:
            rows = pl.ds(i * block, block)
            return _pull(settings, read, width, g, rows, offset + i * block, key, sink_visible, carry)

        return lax.fori_loop(low, jnp.maximum(low, high), queries, carry)

    zeros = jnp.zeros((SINK_BLOCK, d_k.shape[-1]), jnp.float32)
    sums_k, sums_v = lax.fori_loop(0, settings.group, head, (zeros, zeros))
    store(d_k, sums_k * settings.scale, width)
    store(d_v, sums_v, width)
