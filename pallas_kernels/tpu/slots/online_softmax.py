"""A few queries over blocks of cached slots, one after another: the online softmax that decoding kernels share.

The rows of a product are all queries of a key head together. Logits stay unscaled until the exponent; MASKED is what a
slot that is not seen has. The state is the largest logit and the sum of weights, both [rows, LANES] of equal columns,
and the weighted sum of values [rows, D]. Quantised slots are widened in registers, one scale a slot: scales multiply
logits and weights, which are narrow, and never the slots.

`Coded` slots come as `codes.widen` leaves them: as keys and values, or, of values of which each slot has a step, as
whole numbers. Then the weights take the step, and what the leasts add is a sum of one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.partial import Partial
from pallas_kernels.tile_logits import LOG2E, MASKED
from pallas_kernels.tpu.slots import codes
from pallas_kernels.tpu.tiles import LANES, NN, NT, SUBLANES, across, dot


def grouped(q: Float[Array, "B C H D"], key_heads: int) -> Float[Array, "B K rows D"]:
    """Queries by key head, in whole tiles of rows."""
    batch, queries, heads, width = q.shape
    group = heads // key_heads
    rows = -(-group * queries // (2 * SUBLANES)) * 2 * SUBLANES
    x = jnp.transpose(q.reshape(batch, queries, key_heads, group, width), (0, 2, 3, 1, 4))
    x = x.reshape(batch, key_heads, group * queries, width)
    return jnp.pad(x, [(0, 0), (0, 0), (0, rows - group * queries), (0, 0)])


def ungrouped(
    out: Float[Array, "B K rows D"], lse: Float[Array, "B K rows lanes"], q: Float[Array, "B C H D"]
) -> Partial:
    """A kernel's results in the order of the queries."""
    batch, queries, heads, _ = q.shape
    key_heads = out.shape[1]
    group = heads // key_heads

    def order(x: Array) -> Array:
        x = x[:, :, : group * queries].reshape(batch, key_heads, group, queries, *x.shape[3:])
        return jnp.moveaxis(x, 3, 1).reshape(batch, queries, heads, *x.shape[4:])

    return Partial(order(out), order(lse[..., 0]))


def scratch(rows: int, width: int) -> list[Any]:
    """Where the state lies."""
    narrow = pltpu.VMEM((rows, LANES), jnp.float32)
    return [narrow, narrow, pltpu.VMEM((rows, width), jnp.float32)]


def clear(state: Sequence[Any]) -> None:
    """Nothing seen yet."""
    top, total, sums = state
    top[...] = jnp.full_like(top, MASKED)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)


def age(index: jax.Array, first: Any, slots: int) -> jax.Array:
    """Of the tokens in the slots `index` of a ring whose oldest token lies in `first`: how many came before each."""
    behind = index - first
    return jnp.where(behind < 0, behind + slots, behind)


def add(
    scale: float, softcap: float | None, block: Mapping[str, jax.Array], seen: jax.Array, state: Sequence[Any]
) -> None:
    """One more block of slots: q [rows, D], k and v [slots, D], their scales [1, slots]; seen [rows, slots].

    Values in codes have a least and a step for each slot and run of channels instead. What was unpacked with slots
    behind is `k_columns` or `v_columns`, [D, slots].
    """
    top, total, sums = state
    exact = _exponent(scale, softcap)
    scores = dot(block["q"], block["k_columns"], NN) if "k_columns" in block else _products(block["q"], block["k"])
    if "k_scale" in block:
        scores *= block["k_scale"]
    if softcap is not None:
        scores = softcap * jnp.tanh(scores * (scale / softcap))
    scores = jnp.where(seen, scores, MASKED)
    now = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2((scores - across(now, scores.shape[1])) * exact)
    shrink = jnp.exp2((top[...] - now) * exact)
    top[...] = now
    total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    if "v_scale" in block:
        weights *= block["v_scale"]
    if "v_step" in block:
        added = codes.weighted(weights, block["v"], block["v_step"], block.get("v_least"))
    elif "v_columns" in block:
        added = dot(weights.astype(block["q"].dtype), block["v_columns"], NT)
    else:
        added = _weighted(weights.astype(block["q"].dtype), block["v"])
    sums[...] = sums[...] * across(shrink, sums.shape[1]) + added


def finish(scale: float, softcap: float | None, state: Sequence[Any], out: Any, lse: Any) -> None:
    """The output and its log-sum-exp: 0 and -inf where nothing was seen."""
    top, total, sums = state
    some = top[...] > 0.5 * MASKED
    divisor = jnp.where(some, total[...], 1.0)
    out[...] = sums[...] * across(jnp.where(some, 1.0 / divisor, 0.0), sums.shape[1])
    lse[...] = jnp.where(some, top[...] * (_exponent(scale, softcap) / LOG2E) + jnp.log(divisor), -jnp.inf)


def _exponent(scale: float, softcap: float | None) -> float:
    """What a logit is multiplied with in the exponent of 2."""
    return LOG2E * (scale if softcap is None else 1.0)


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
