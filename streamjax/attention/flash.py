"""Blockwise exact attention as one differentiable function: memory linear in the sequence, forwards and backwards.

The loops are in `blockwise.py`; this is their `custom_vjp`, for whole arrays of queries and keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.partial import Partial, accumulator, named
from pallas_kernels.patterns import Pattern
from streamjax.attention.blockwise import Blocks, Keys, Queries, backward, block_sizes, even_block, forward


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
    block_q: int | None = None,
    block_k: int | None = None,
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
      block_q, block_k: block sizes, by default those of `block_sizes`; any length is padded inside.
    """
    length_q, length_k, heads_k = q.shape[1], k.shape[1], k.shape[2]
    default_q, default_k = block_sizes()
    block_q, block_k = even_block(length_q, block_q or default_q), min(block_k or default_k, length_k)
    if segment_ids is None or isinstance(segment_ids, tuple):
        segments = segment_ids or (None, None)
    else:
        segments = (segment_ids, segment_ids)

    def pad(x: Array, axis: int, block: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % block)
        return jnp.pad(x, widths) if widths[axis][1] else x

    queries = Queries(
        q=pad(rearrange(q, "b t (k g) d -> b k g t d", k=heads_k), 3, block_q),
        segments=None if segments[0] is None else pad(segments[0], 1, block_q),
        slopes=None if slopes is None else rearrange(slopes, "(k g) -> k g", k=heads_k),
        offset=jnp.asarray(offset, jnp.int32),
    )
    keys = Keys(
        k=pad(rearrange(k, "b s k d -> 1 b k s d"), 3, block_k),
        v=pad(rearrange(v, "b s k d -> 1 b k s d"), 3, block_k),
        segments=None if segments[1] is None else pad(segments[1], 1, block_k),
        row=jnp.int32(0),
        base=jnp.int32(0),
        stop=jnp.int32(length_k),
    )
    out, lse = _attention(Blocks(pattern, scale, softcap, block_q, block_k), queries, keys)
    out, lse = out[:, :, :, :length_q], lse[:, :, :, :length_q]
    return Partial(rearrange(out, "b k g t d -> b t (k g) d"), rearrange(lse, "b k g t -> b t (k g)"))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(blocks: Blocks, queries: Queries, keys: Keys) -> tuple[Array, Array]:
    return forward(blocks, queries, keys)


def _forward(blocks: Blocks, queries: Queries, keys: Keys) -> tuple[tuple[Array, Array], Any]:
    out, lse = named(forward(blocks, queries, keys))
    return (out, lse), (queries, keys, out, lse)


def _backward(blocks: Blocks, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Queries, Keys]:
    queries, keys, out, lse = saved
    d_out, d_lse = cotangents
    dtype = accumulator(queries.q.dtype)
    shift = d_lse - jnp.sum(d_out * out, axis=-1)
    zeros = jnp.zeros(keys.k.shape, dtype), jnp.zeros(keys.v.shape, dtype)
    d_q, d_k, d_v = backward(blocks, queries, keys, lse, d_out, shift, *zeros)

    def integer(x: Any) -> Any:
        return None if x is None else jnp.zeros(jnp.shape(x), jax.dtypes.float0)

    return (
        Queries(
            d_q.astype(queries.q.dtype),
            integer(queries.segments),
            None if queries.slopes is None else jnp.zeros_like(queries.slopes),
            integer(queries.offset),
        ),
        Keys(
            d_k.astype(keys.k.dtype),
            d_v.astype(keys.v.dtype),
            integer(keys.segments),
            integer(keys.row),
            integer(keys.base),
            integer(keys.stop),
        ),
    )


_attention.defvjp(_forward, _backward)
