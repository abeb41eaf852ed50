"""Decoding on TPUs: a few queries against a cache of many slots, as one partial of attention.

What counts is that each slot is read once, and only if it holds something. The rows of a product are all queries of a
key head together, and blocks of slots behind the last filled one are not fetched. Slots may be split into shares that
different cores work on; their partials are merged (Lean Attention, 2405.10480). Quantised slots are widened in
registers, one scale a slot: scales multiply logits and weights, which are narrow, and never the slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.logits import LOG2E, MASKED
from pallas_kernels.partial import Partial, merge
from pallas_kernels.tpu.tiles import LANES, NN, NT, SUBLANES, across, dot

BLOCK = 1024  # slots
READS = ("q", "k", "v", "k_scale", "v_scale")


@dataclasses.dataclass(frozen=True)
class _Static:
    """scale, softcap: of the logits. window: tokens before a query that it sees, None for all. slots: without padding.
    queries: of one row and head. blocks: of slots in a share."""

    scale: float
    softcap: float | None
    window: int | None
    slots: int
    queries: int
    block: int
    blocks: int

    def filled(self, count: Any, first: Any) -> Any:
        """How many slots from the first on may hold something."""
        return jnp.minimum(first + count, self.slots)


def decode_attention(
    q: Float[Array, "B C H D"],
    k: Array,
    v: Array,
    count: Int32[Array, " B"],
    *,
    scale: float,
    first: Int32[Array, " B"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    k_scale: Float[Array, "B K S"] | None = None,
    v_scale: Float[Array, "B K S"] | None = None,
    splits: int = 1,
    block: int | None = None,
    interpret: Any = False,
) -> Partial:
    """`pallas_kernels.api.decode_attention` on a TPU; see there for the arguments.

    block: slots that are read at once, a multiple of 128. splits: shares of the slots.
    """
    batch, queries, heads, width = q.shape
    key_heads, slots = k.shape[1], k.shape[2]
    group = heads // key_heads
    block = min(block or BLOCK, -(-slots // LANES) * LANES)
    blocks = -(-slots // (block * splits))
    static = _Static(scale, softcap, window, slots, queries, block, blocks)
    pad = splits * blocks * block - slots
    cache = {"k": k, "v": v}
    if k_scale is not None and v_scale is not None:
        cache |= {"k_scale": k_scale[:, :, None], "v_scale": v_scale[:, :, None]}
    if pad:
        cache = {
            name: jnp.pad(x, [(0, 0)] * (3 if "scale" in name else 2) + [(0, pad)] + [(0, 0)] * ("scale" not in name))
            for name, x in cache.items()
        }
    rows = -(-group * queries // (2 * SUBLANES)) * 2 * SUBLANES
    grouped = jnp.transpose(q.reshape(batch, queries, key_heads, group, width), (0, 2, 3, 1, 4))
    grouped = grouped.reshape(batch, key_heads, group * queries, width)
    grouped = jnp.pad(grouped, [(0, 0), (0, 0), (0, rows - group * queries), (0, 0)])
    held = jnp.stack([count, jnp.zeros_like(count) if first is None else first])
    out, lse = _call(static, splits, interpret, held.astype(jnp.int32), {"q": grouped, **cache})

    def ungrouped(x: Array) -> Array:
        x = x[:, :, : group * queries].reshape(batch, key_heads, group, queries, *x.shape[3:])
        return jnp.moveaxis(x, 3, 1).reshape(batch, queries, heads, *x.shape[4:])

    shares = [Partial(ungrouped(out[:, :, i]), ungrouped(lse[:, :, i, :, 0])) for i in range(splits)]
    return merge(*shares)


def _call(
    static: _Static, splits: int, interpret: Any, held: Int32[Array, "2 B"], arrays: Mapping[str, Array]
) -> tuple[Array, Array]:
    """Output [B, K, splits, rows, D] and log-sum-exp [B, K, splits, rows, LANES]."""
    batch, heads, rows, width = arrays["q"].shape
    names = [name for name in READS if name in arrays]

    def at(b: Any, share: Any, n: Any, held: Any) -> Any:
        """The block of slots of a step: past the last one that holds something, that one again."""
        filled = static.filled(held[0, b], held[1, b])
        last = jnp.maximum(lax.div(filled + static.block - 1, jnp.int32(static.block)) - 1, 0)
        return jnp.minimum(share * static.blocks + n, jnp.maximum(last, share * static.blocks))

    def cache(columns: int) -> Any:
        shape = (None, None, static.block, columns)
        return pl.BlockSpec(shape, lambda b, h, share, n, held: (b, h, at(b, share, n, held), 0))

    scales = pl.BlockSpec((None, None, 1, static.block), lambda b, h, share, n, held: (b, h, 0, at(b, share, n, held)))
    specs = {
        "q": pl.BlockSpec((None, None, rows, width), lambda b, h, share, n, held: (b, h, 0, 0)),
        "k": cache(arrays["k"].shape[-1]),
        "v": cache(arrays["v"].shape[-1]),
        "k_scale": scales,
        "v_scale": scales,
    }

    def result(columns: int) -> Any:
        return pl.BlockSpec((None, None, None, rows, columns), lambda b, h, share, n, held: (b, h, share, 0, 0))

    state = pltpu.VMEM((rows, LANES), jnp.float32)
    call = pl.pallas_call(
        partial(_kernel, static, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, splits, static.blocks),
            in_specs=[specs[name] for name in names],
            out_specs=[result(width), result(LANES)],
            scratch_shapes=[state, state, pltpu.VMEM((rows, width), jnp.float32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, splits, rows, columns), jnp.float32) for columns in (width, LANES)
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )
    out, lse = call(held, *(arrays[name] for name in names))
    return out, lse


def _kernel(static: _Static, names: list[str], held_ref: Any, *refs: Any) -> None:
    read = dict(zip(names, refs, strict=False))
    out, lse, top, total, sums = refs[len(names) :]
    row, n = pl.program_id(0), pl.program_id(3)
    count, first = held_ref[0, row], held_ref[1, row]
    slot = (pl.program_id(2) * static.blocks + n) * static.block
    exact = LOG2E * (static.scale if static.softcap is None else 1.0)

    @pl.when(n == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    wrapped = first + count > static.slots

    @pl.when((slot < static.filled(count, first)) & (wrapped | (slot + static.block > first)))
    def _() -> None:
        scores = _products(read["q"][...], read["k"][...])
        if "k_scale" in read:
            scores *= read["k_scale"][...]
        if static.softcap is not None:
            scores = static.softcap * jnp.tanh(scores * (static.scale / static.softcap))
        index = slot + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        age = index - first  # of the token in a slot: how many came before it
        age = jnp.where(age < 0, age + static.slots, age)
        seen = (age < count) & (index < static.slots)
        if static.window is not None:
            query = lax.rem(lax.broadcasted_iota(jnp.int32, scores.shape, 0), jnp.int32(static.queries))
            seen &= age >= count + query - static.window
        scores = jnp.where(seen, scores, MASKED)
        now = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2((scores - across(now, scores.shape[1])) * exact)
        shrink = jnp.exp2((top[...] - now) * exact)
        top[...] = now
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        if "v_scale" in read:
            weights *= read["v_scale"][...]
        added = _weighted(weights.astype(read["q"].dtype), read["v"][...])
        sums[...] = sums[...] * across(shrink, sums.shape[1]) + added

    @pl.when(n == static.blocks - 1)
    def _() -> None:
        some = top[...] > 0.5 * MASKED
        divisor = jnp.where(some, total[...], 1.0)
        out[...] = sums[...] * across(jnp.where(some, 1.0 / divisor, 0.0), sums.shape[1])
        lse[...] = jnp.where(some, top[...] * (exact / LOG2E) + jnp.log(divisor), -jnp.inf)


def _halves(x: jax.Array, dtype: Any) -> list[jax.Array]:
    """The two signed numbers of four bits in each byte."""
    wide = x.astype(jnp.int32)
    high = lax.shift_right_arithmetic(lax.shift_left(wide, jnp.int32(24)), jnp.int32(28))
    low = lax.shift_right_arithmetic(lax.shift_left(wide, jnp.int32(28)), jnp.int32(28))
    return [half.astype(jnp.float32).astype(dtype) for half in (low, high)]


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    """Dot products of queries and slots, whatever a slot's numbers are."""
    if k.dtype == jnp.uint8:
        low, high = _halves(k, q.dtype)
        half = q.shape[1] // 2
        return dot(q[:, :half], low, NT) + dot(q[:, half:], high, NT)
    return dot(q, k if k.dtype == q.dtype else k.astype(jnp.float32).astype(q.dtype), NT)


def _weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Sums of slots, weighted."""
    if v.dtype == jnp.uint8:
        return jnp.concatenate([dot(weights, half, NN) for half in _halves(v, weights.dtype)], axis=1)
    return dot(weights, v if v.dtype == weights.dtype else v.astype(jnp.float32).astype(weights.dtype), NN)
