"""A few queries over blocks of cached slots, one after another: the online softmax that decoding kernels share.

The rows of a product are all queries of a key head together. Logits stay unscaled until the exponent; MASKED is what a
slot that is not seen has. The state is the largest logit and the sum of weights, both [rows, LANES] of equal columns,
and the weighted sum of values [rows, D]. Quantised slots are widened in registers, one scale a slot: scales multiply
logits and weights, which are narrow, and never the slots.

Of `Coded` slots, where each channel of a group has a least and a step, as of keys, a block is made of its codes and
multiplied as ever. Where each slot has them, as of values, the weights take the step, the codes are multiplied as they
are, and what the leasts add is a sum of one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.coded import Along, Coded
from pallas_kernels.partial import Partial
from pallas_kernels.tile_logits import LOG2E, MASKED
from pallas_kernels.tpu.tiles import LANES, NN, NT, SUBLANES, across, dot

NUMBERS = ("k_least", "k_step", "v_least", "v_step")
TILE = 16  # rows of bfloat16 numbers that fill a tile


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


def start(state: Sequence[Any]) -> None:
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

    Values in codes have a least and a step for each slot and run of channels instead.
    """
    top, total, sums = state
    exact = _exponent(scale, softcap)
    scores = _products(block["q"], block["k"])
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
        added = _weighted_codes(weights, block["v"], block["v_least"], block["v_step"])
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


class Lying(NamedTuple):
    """bits: of a code. group: slots whose codes fill whole rows of bytes. along: what has a least and a step."""

    bits: int
    group: int
    along: Along

    @property
    def planes(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits


def lying(k: Coded, v: Coded) -> tuple[Lying, Lying]:
    """How keys and values lie.

    Raises:
      ValueError: they lie as this kernel does not read them.
    """
    if k.along != "channel":
        raise ValueError('keys along "token": the kernels for TPUs take keys along "channel"')
    for x in (k, v):
        if x.rows % SUBLANES:
            raise ValueError(f"groups of {x.group} slots in {x.bits} bits: TPUs take whole {SUBLANES} rows of bytes")
    return Lying(k.bits, k.group, k.along), Lying(v.bits, v.group, v.along)


def operands(k: Coded, v: Coded) -> dict[str, Array]:
    """Arrays by name; numbers along tokens with slots behind, as a TPU lays them out anyway."""
    found = {"k": k.codes, "v": v.codes, "k_least": k.least, "k_step": k.step, "v_least": v.least, "v_step": v.step}
    if v.along == "token":
        found |= {name: jnp.swapaxes(found[name], 2, 3) for name in ("v_least", "v_step")}
    return found


def widen(k: Lying, v: Lying, block: dict[str, Any]) -> None:
    """Keys in the place of their codes, [slots, D], and values; these as whole numbers if theirs are along tokens."""
    for name, lying in (("k", k), ("v", v)):
        numbers = _numbers(block[name], lying)
        if lying.along == "channel":
            least, step = (block.pop(f"{name}_{of}").astype(jnp.float32)[:, None] for of in ("least", "step"))
            numbers = least + step * numbers
        block[name] = numbers.reshape(-1, numbers.shape[2]).astype(block["q"].dtype)


def _numbers(codes: jax.Array, lying: Lying) -> jax.Array:
    """Codes [rows of bytes, D] as numbers [groups, slots, D], float32."""
    groups = codes.shape[0] * lying.planes // lying.group
    wide = codes.astype(jnp.int32).reshape(groups, -1, codes.shape[1])
    planes = [lax.shift_right_logical(wide, jnp.int32(lying.bits * i)) for i in range(lying.planes)]
    last = lying.planes - 1
    planes = [x if i == last else x & (2**lying.bits - 1) for i, x in enumerate(planes)]
    return jnp.concatenate(planes, axis=1).astype(jnp.float32)


def _weighted_codes(weights: jax.Array, codes: jax.Array, least: jax.Array, step: jax.Array) -> jax.Array:
    """Sums [rows, D] of values by weights [rows, slots]; least and step are [runs of channels, slots]."""
    rows, runs = weights.shape[0], least.shape[0]
    least, step = (x.astype(jnp.float32) for x in (least, step))
    scaled = jnp.concatenate([weights * step[i : i + 1] for i in range(runs)], axis=0)
    found = dot(scaled.astype(codes.dtype), codes, NN)
    channel = lax.broadcasted_iota(jnp.int32, (rows, codes.shape[1]), 1)
    total = jnp.zeros((rows, codes.shape[1]), jnp.float32)
    for i in range(runs):
        one = found[i * rows : (i + 1) * rows] + jnp.sum(weights * least[i : i + 1], axis=1, keepdims=True)
        total = one if i == 0 else jnp.where(channel >= i * (codes.shape[1] // runs), one, total)
    return total
