"""FlashAttention forwards for GPUs, in Triton: output and log-sum-exp, of causal patterns with a window and sinks.

A program holds one block of queries and loops over the blocks of keys that the pattern needs (FlashAttention-2,
2307.08691); whole blocks are not masked. Sinks behind the window come first, sixteen at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.block_ranges import Ranges
from pallas_kernels.gpu.exponentials import MASKED, exp2, tanh
from pallas_kernels.gpu.flash_operands import SINK_BLOCK, Operands, dot, load, over_keys, over_sinks, specs, store
from pallas_kernels.tile_logits import LOG2E, Settings, logits, sink_visible, tile_mask

READS = ("offset", "q", "k", "v", "slopes", "query_ids", "key_ids")


def forward(settings: Settings, ranges: Ranges, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output, float32 [B, T, H, D], and log-sum-exp, float32 [B, H, T]; 0 and -inf where nothing is seen."""
    batch, length, heads, width = operands["q"].shape
    blocks = specs(settings, ranges, operands)
    names = [name for name in READS if name in operands]
    call = pl.pallas_call(
        partial(_kernel, settings, ranges, names, width),
        grid=(ranges.blocks, batch, heads),
        in_specs=[blocks[name] for name in names],
        out_specs=[blocks["q"], blocks["lse"]],
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, heads, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=2),
        interpret=settings.interpreted,
        name="flash_forward",
    )
    out, lse = call(*(operands[name] for name in names))
    return out, lse


def _kernel(settings: Settings, ranges: Ranges, names: list[str], width: int, *refs: Any) -> None:
    read = dict(zip(names, refs, strict=False))
    out_ref, lse_ref = refs[len(names) :]
    i, offset = pl.program_id(0), read["offset"][0]
    query = offset + i * ranges.block_q
    slope = read["slopes"][0] if settings.alibi else None
    q = load(read["q"], slice(None), width)
    ids = read["query_ids"][...][:, None] if settings.segmented else None

    def scores(rows: Any, key: Any) -> tuple[jax.Array, Any]:
        dots = dot(q, load(read["k"], rows, width).T)
        found, _ = logits(settings, dots, query, key, slope, tanh=tanh(q.dtype, settings.interpreted))
        return found, (ids, read["key_ids"][rows][None]) if settings.segmented else None

    def add(rows: Any, found: jax.Array, carry: Any) -> Any:
        top, total, sums = carry
        now = jnp.maximum(top, jnp.max(found, axis=1) * settings.exact)
        weights = exp2(found, settings.exact, now[:, None], settings.interpreted)
        shrink = exp2(top, 1.0, now, settings.interpreted)
        v = load(read["v"], rows, width)
        return now, total * shrink + jnp.sum(weights, axis=1), sums * shrink[:, None] + dot(weights.astype(v.dtype), v)

    def sinks(j: Any, carry: Any) -> Any:
        rows = pl.ds(j * SINK_BLOCK, SINK_BLOCK)
        found, segments = scores(rows, j * SINK_BLOCK)
        seen = sink_visible(settings, found.shape, query, j * SINK_BLOCK, segments)
        return add(rows, jnp.where(seen, found, MASKED), carry)

    def keys(masked: bool, j: Any, carry: Any) -> Any:
        key = j * ranges.block_k
        rows = pl.ds(key, ranges.block_k)
        found, segments = scores(rows, key)
        if masked:
            found = jnp.where(tile_mask(settings, found.shape, query, key, segments), found, MASKED)
        return add(rows, found, carry)

    carry = (
        jnp.full(ranges.block_q, MASKED * settings.exact, jnp.float32),  # exponents of 2
        jnp.zeros(ranges.block_q, jnp.float32),
        jnp.zeros((ranges.block_q, out_ref.shape[-1]), jnp.float32),
    )
    carry = over_sinks(settings, ranges, i, offset, sinks, carry)
    top, total, sums = over_keys(settings, ranges, i, offset, keys, carry)
    some = top > 0.5 * MASKED * settings.exact
    divisor = jnp.where(some, total, 1.0)
    store(out_ref, jnp.where(some[:, None], sums / divisor[:, None], 0.0), width)
    lse_ref[...] = jnp.where(some, top / LOG2E + jnp.log(divisor), -jnp.inf)
