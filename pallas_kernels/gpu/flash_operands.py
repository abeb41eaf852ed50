"""Arrays as the Triton kernels of attention read them, and loops over the blocks that a pattern needs.

Operands go by name: q, d_out [B, T, H, D], k, v [B, S, K, D] with T and S padded to whole blocks, or as they lie in a
buffer, [B, K, S, D] (`Settings.heads_first`); d_k, d_v, sums so far, likewise; lse, shift [B, H, T]; slopes [H];
query_ids [B, T], key_ids [B, S]; offset [1]. Triton's blocks are powers of two: channels beyond
D read as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.block_ranges import Ranges, divide
from pallas_kernels.tile_logits import Settings

Operands = Mapping[str, jax.Array]
SINK_BLOCK = 16  # keys: the smallest side of a product


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """[m, n] x [n, l], summed in float32; of float32 numbers in full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def load(ref: Any, rows: Any, width: int, head: Any = None) -> jax.Array:
    """Rows of a [n, padded width] reference, or of [n, heads, padded width], with zeros beyond `width`."""
    at = ref.at[rows, :] if head is None else ref.at[rows, head, :]
    padded = ref.shape[-1]
    if padded == width:
        return plgpu.load(at)
    return plgpu.load(at, mask=(jnp.arange(padded) < width)[None], other=0.0)


def store(ref: Any, value: jax.Array, width: int) -> None:
    """A [n, padded width] block without what lies beyond `width`."""
    if ref.shape[-1] == width:
        ref[...] = value.astype(ref.dtype)
    else:
        mask = jnp.broadcast_to((jnp.arange(ref.shape[-1]) < width)[None], value.shape)
        plgpu.store(ref, value.astype(ref.dtype), mask=mask)


def over_keys(settings: Settings, ranges: Ranges, i: Any, offset: Any, body: Callable[..., Any], carry: Any) -> Any:
    """`body(masked, j, carry)` for the key blocks that query block i sees: those cut by the window's start, whole ones,
    and those cut by the diagonal or the end of the keys."""
    low, high = ranges.range(i, offset)
    if settings.segmented:
        return lax.fori_loop(low, high, lambda j, x: body(True, j, x), carry)
    first = offset + i * ranges.block_q
    whole = jnp.minimum(divide(first + 1, ranges.block_k), ranges.keys // ranges.block_k)
    start = low
    if ranges.window is not None:
        edge = jnp.maximum(first + ranges.block_q - ranges.window, 0)  # the first key that all queries see
        start = jnp.clip(divide(edge + ranges.block_k - 1, ranges.block_k), low, high)
        carry = lax.fori_loop(low, start, lambda j, x: body(True, j, x), carry)
    stop = jnp.clip(whole, start, high)
    carry = lax.fori_loop(start, stop, lambda j, x: body(False, j, x), carry)
    return lax.fori_loop(stop, high, lambda j, x: body(True, j, x), carry)


def over_sinks(settings: Settings, ranges: Ranges, i: Any, offset: Any, body: Callable[..., Any], carry: Any) -> Any:
    """`body(j, carry)` for the blocks of sinks that query block i sees behind its window."""
    if not settings.sinks or settings.window is None:
        return carry
    blocks = -(-settings.sinks // SINK_BLOCK)
    late = offset + (i + 1) * ranges.block_q > settings.window
    return lax.fori_loop(jnp.int32(0), jnp.where(late, jnp.int32(blocks), jnp.int32(0)), body, carry)


def key_spec(settings: Settings, size: int, width: int, block: Callable[[Any], Any], group: int = 1) -> Any:
    """Block `block(i)` of `size` keys in a grid (i, batch, head), `group` heads of which share a key head."""
    if settings.heads_first:
        return pl.BlockSpec((None, None, size, width), lambda i, b, h: (b, lax.div(h, group), block(i), 0))
    return pl.BlockSpec((None, size, None, width), lambda i, b, h: (b, block(i), lax.div(h, group), 0))


def specs(settings: Settings, ranges: Ranges, operands: Operands) -> dict[str, Any]:
    """Blocks of the operands in a grid (block of queries, batch, query head)."""
    group, width = settings.group, pl.next_power_of_2(operands["q"].shape[-1])
    keys, block_q = operands["k"].shape[2 if settings.heads_first else 1], ranges.block_q
    query = pl.BlockSpec((None, block_q, None, width), lambda i, b, h: (b, i, h, 0))
    key = key_spec(settings, keys, width, lambda i: 0, group)
    line = pl.BlockSpec((None, None, block_q), lambda i, b, h: (b, h, i))
    return {
        "offset": pl.BlockSpec((1,), lambda i, b, h: (0,)),
        "q": query,
        "d_out": query,
        "k": key,
        "v": key,
        "lse": line,
        "shift": line,
        "slopes": pl.BlockSpec((1,), lambda i, b, h: (h,)),
        "query_ids": pl.BlockSpec((None, block_q), lambda i, b, h: (b, i)),
        "key_ids": pl.BlockSpec((None, keys), lambda i, b, h: (b, 0)),
    }
