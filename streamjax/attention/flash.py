"""Blockwise exact attention in plain XLA: memory linear in the sequence, forwards and backwards.

The algorithm of FlashAttention-2 (2307.08691): queries in blocks, an online softmax over blocks of keys, and a backward
pass that recomputes the probabilities from the log-sum-exp. Loops over key blocks have dynamic bounds that come from
the pattern, so blocks that it rules out are neither loaded nor computed; sinks are their own, leading blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Int32

from streamjax.attention.partial import Partial
from streamjax.attention.patterns import Pattern


class _Spec(NamedTuple):
    """What is static in one call."""

    pattern: Pattern
    scale: float
    softcap: float | None
    block_q: int
    block_k: int
    length_k: int  # keys before padding


class _Inputs(NamedTuple):
    """Arrays of one call, padded to whole blocks: q [B, K, G, T, D], k and v [B, K, S, D], ids [B, T] and [B, S]."""

    q: Array
    k: Array
    v: Array
    segments_q: Array | None
    segments_k: Array | None
    slopes: Array | None  # [K, G]
    offset: Array  # index of the first query among the keys


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    pattern: Pattern,
    *,
    scale: float,
    segment_ids: Int32[Array, "B T"] | tuple[Int32[Array, "B T"], Int32[Array, "B S"]] | None = None,
    offset: Int[Array, ""] | int = 0,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    block_q: int = 512,
    block_k: int = 512,
) -> Partial:
    """Attention of T queries, the first of which has index `offset`, over S keys with indices 0 to S - 1.

    Differentiable in q, k and v, through both `out` and `lse` of the result.

    Args:
      q, k, v: rotated queries and keys, values; H a multiple of K.
      pattern: which keys a query sees, by index.
      scale: factor on the logits.
      segment_ids: tokens see only their own segment; a pair gives queries' and keys' ids apart.
      offset: index of the first query, for a chunk deep in a sequence; may be traced.
      softcap: logits become `softcap * tanh(logits / softcap)`.
      slopes: ALiBi, `-slope * distance` added to the scaled logits; constants, their gradient is zero.
      block_q, block_k: block sizes; any length is padded inside.
    """
    length_q, length_k, heads_k = q.shape[1], k.shape[1], k.shape[2]
    block_q, block_k = min(block_q, length_q), min(block_k, length_k)
    if segment_ids is None or isinstance(segment_ids, tuple):
        segments = segment_ids or (None, None)
    else:
        segments = (segment_ids, segment_ids)

    def pad(x: Array, axis: int, block: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % block)
        return jnp.pad(x, widths) if widths[axis][1] else x

    inputs = _Inputs(
        q=pad(rearrange(q, "b t (k g) d -> b k g t d", k=heads_k), 3, block_q),
        k=pad(rearrange(k, "b s k d -> b k s d"), 2, block_k),
        v=pad(rearrange(v, "b s k d -> b k s d"), 2, block_k),
        segments_q=None if segments[0] is None else pad(segments[0], 1, block_q),
        segments_k=None if segments[1] is None else pad(segments[1], 1, block_k),
        slopes=None if slopes is None else rearrange(slopes, "(k g) -> k g", k=heads_k),
        offset=jnp.asarray(offset, jnp.int32),
    )
    out, lse = _attention(_Spec(pattern, scale, softcap, block_q, block_k, length_k), inputs)
    out, lse = out[:, :, :, :length_q], lse[:, :, :, :length_q]
    return Partial(rearrange(out, "b k g t d -> b t (k g) d"), rearrange(lse, "b k g t -> b t (k g)"))


def _logits(spec: _Spec, inputs: _Inputs, i: Array, j: Array) -> tuple[Array, Array]:
    """Masked logits of query block i and key block j, [B, K, G, bq, bk], and d(logits)/d(dot product)."""
    q = jax.lax.dynamic_slice_in_dim(inputs.q, i * spec.block_q, spec.block_q, 3)
    k = jax.lax.dynamic_slice_in_dim(inputs.k, j * spec.block_k, spec.block_k, 2)
    logits = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=_accumulator(q)) * spec.scale
    slope = jnp.asarray(spec.scale, logits.dtype)
    if spec.softcap is not None:
        squashed = jnp.tanh(logits / spec.softcap)
        logits = spec.softcap * squashed
        slope = slope * (1.0 - jnp.square(squashed))
    query = inputs.offset + i * spec.block_q + jnp.arange(spec.block_q)[:, None]
    key = j * spec.block_k + jnp.arange(spec.block_k)[None]
    if inputs.slopes is not None:
        logits = logits - inputs.slopes[..., None, None] * (query - key).astype(logits.dtype)
    visible = (spec.pattern.visible(query, key) & (key < spec.length_k))[None]
    if inputs.segments_q is not None and inputs.segments_k is not None:
        ids_q = jax.lax.dynamic_slice_in_dim(inputs.segments_q, i * spec.block_q, spec.block_q, 1)
        ids_k = jax.lax.dynamic_slice_in_dim(inputs.segments_k, j * spec.block_k, spec.block_k, 1)
        visible = visible & (ids_q[:, :, None] == ids_k[:, None, :])
    return jnp.where(visible[:, None, None], logits, -jnp.inf), slope


def _accumulator(x: Array) -> Any:
    """float32, or float64 for float64 inputs."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _over_keys(spec: _Spec, inputs: _Inputs, i: Array, body: Any, carry: Any) -> Any:
    """Run `body(j, carry)` for every key block j that query block i can see: leading sinks, then the range."""
    first = inputs.offset + i * spec.block_q
    low, high = spec.pattern.key_range(first, first + spec.block_q - 1)
    blocks = inputs.k.shape[2] // spec.block_k
    high = jnp.clip((high + spec.block_k - 1) // spec.block_k, 0, blocks)
    low = jnp.clip(low // spec.block_k, 0, high)
    sinks = -(-spec.pattern.sinks // spec.block_k)
    if sinks:
        carry = jax.lax.fori_loop(0, jnp.minimum(sinks, low), body, carry)
    return jax.lax.fori_loop(low, high, body, carry)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: _Spec, inputs: _Inputs) -> tuple[Array, Array]:
    return _forward(spec, inputs)[0]


def _forward(spec: _Spec, inputs: _Inputs) -> tuple[tuple[Array, Array], tuple[_Inputs, Array, Array]]:
    b, heads, group, length, width = inputs.q.shape
    dtype = _accumulator(inputs.q)

    def block(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        def body(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, total, top = state
            logits, _ = _logits(spec, inputs, i, j)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            safe = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
            weights = jnp.exp(logits - safe[..., None])
            shrink = jnp.exp(top - safe)
            v = jax.lax.dynamic_slice_in_dim(inputs.v, j * spec.block_k, spec.block_k, 2)
            add = jnp.einsum("bkgts,bksd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=dtype)
            return out * shrink[..., None] + add, total * shrink + jnp.sum(weights, axis=-1), new_top

        rows = (b, heads, group, spec.block_q)
        start = (jnp.zeros((*rows, width), dtype), jnp.zeros(rows, dtype), jnp.full(rows, -jnp.inf, dtype))
        out, total, top = _over_keys(spec, inputs, i, body, start)
        some = total > 0
        divisor = jnp.where(some, total, 1.0)
        lse = jnp.where(some, top + jnp.log(divisor), -jnp.inf)
        at = i * spec.block_q
        return (
            jax.lax.dynamic_update_slice_in_dim(carry[0], out / divisor[..., None], at, 3),
            jax.lax.dynamic_update_slice_in_dim(carry[1], lse, at, 3),
        )

    empty = jnp.zeros((b, heads, group, length, width), dtype), jnp.zeros((b, heads, group, length), dtype)
    out, lse = jax.lax.fori_loop(0, length // spec.block_q, block, empty)
    return (out, lse), (inputs, out, lse)


def _backward(spec: _Spec, saved: tuple[_Inputs, Array, Array], cotangents: tuple[Array, Array]) -> tuple[_Inputs]:
    inputs, out, lse = saved
    d_out, d_lse = cotangents
    dtype = _accumulator(inputs.q)
    # d(logits) = p * (dp - sum(d_out * out) + d_lse)
    shift = d_lse - jnp.sum(d_out * out, axis=-1)
    safe = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # rows that attended nothing get probabilities of 0

    def block(i: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        at = i * spec.block_q
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=spec.block_q, axis=3)
        q, d_o, row_lse, row_shift = take(inputs.q), take(d_out), take(safe), take(shift)

        def body(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k, d_v = state
            logits, slope = _logits(spec, inputs, i, j)
            weights = jnp.exp(logits - row_lse[..., None])
            start = j * spec.block_k
            k = jax.lax.dynamic_slice_in_dim(inputs.k, start, spec.block_k, 2)
            v = jax.lax.dynamic_slice_in_dim(inputs.v, start, spec.block_k, 2)
            d_weights = jnp.einsum("bkgtd,bksd->bkgts", d_o.astype(v.dtype), v, preferred_element_type=dtype)
            d_dots = (weights * (d_weights + row_shift[..., None]) * slope).astype(q.dtype)
            d_q = d_q + jnp.einsum("bkgts,bksd->bkgtd", d_dots, k, preferred_element_type=dtype)
            d_k = _add(d_k, jnp.einsum("bkgts,bkgtd->bksd", d_dots, q, preferred_element_type=dtype), start)
            add = jnp.einsum(
                "bkgts,bkgtd->bksd", weights.astype(v.dtype), d_o.astype(v.dtype), preferred_element_type=dtype
            )
            return d_q, d_k, _add(d_v, add, start)

        d_q, d_k, d_v = grads
        zero = jnp.zeros(q.shape, dtype)
        block_dq, d_k, d_v = _over_keys(spec, inputs, i, body, (zero, d_k, d_v))
        return jax.lax.dynamic_update_slice_in_dim(d_q, block_dq, at, 3), d_k, d_v

    zeros = tuple(jnp.zeros(x.shape, dtype) for x in (inputs.q, inputs.k, inputs.v))
    d_q, d_k, d_v = jax.lax.fori_loop(0, inputs.q.shape[3] // spec.block_q, block, zeros)

    def integer(x: Array | None) -> Any:
        return None if x is None else jnp.zeros(x.shape, jax.dtypes.float0)

    return (
        _Inputs(
            d_q.astype(inputs.q.dtype),
            d_k.astype(inputs.k.dtype),
            d_v.astype(inputs.v.dtype),
            integer(inputs.segments_q),
            integer(inputs.segments_k),
            None if inputs.slopes is None else jnp.zeros_like(inputs.slopes),
            integer(inputs.offset),
        ),
    )


def _add(total: Array, part: Array, start: Array) -> Array:
    """Add `part` to a slice of `total` along axis 2."""
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], 2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, 2)


_attention.defvjp(_forward, _backward)
