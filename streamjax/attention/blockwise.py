"""The two block loops of exact attention in plain XLA, forwards and backwards, over keys that lie in a longer buffer.

The algorithm of FlashAttention-2 (2307.08691): queries in blocks, an online softmax over blocks of keys, and a backward
pass that recomputes the probabilities from the log-sum-exp. Loops over key blocks have dynamic bounds that come from
the pattern, so blocks that it rules out are neither loaded nor computed; sinks are their own, leading blocks.

`flash.py` makes one differentiable function of the two. Chunked backprop calls them apart: its queries are one chunk
of a sequence, its keys the buffer of all chunks, and gradients of keys are added in place to buffers of the same shape.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from pallas_kernels.partial import accumulator
from pallas_kernels.patterns import Pattern
from streamjax.attention.block_cutting import even_size


class Blocks(NamedTuple):
    """What is static: how queries and keys meet, and in which blocks. `leading`: see `Keys`."""

    pattern: Pattern
    scale: float
    softcap: float | None
    block_q: int
    block_k: int
    leading: int = 0


class Queries(NamedTuple):
    """Queries of consecutive tokens, the first of which has index `offset`; C is a multiple of `block_q`."""

    q: Float[Array, "B K G C D"]
    segments: Int32[Array, "B C"] | None
    slopes: Float[Array, "K G"] | None
    offset: Int[Array, ""] | int


class Keys(NamedTuple):
    """Keys and values in slots of a buffer; S is a multiple of `block_k`.

    The buffers may hold R layers, of which `row` is meant. The first `leading` slots hold the keys with indices 0 to
    leading - 1; slot `leading` holds the key with index `base`, and so on. A slot whose key would have an index below
    `leading` there, and slots from `stop` on, hold nothing.
    """

    k: Float[Array, "R B K S D"]
    v: Float[Array, "R B K S D"]
    segments: Int32[Array, "B S"] | None
    row: Int[Array, ""] | int
    base: Int[Array, ""] | int
    stop: Int[Array, ""] | int


def block_sizes() -> tuple[int, int]:
    """Queries and keys of a block that suit the platform, however many heads there are.

    On a CPU the logits of a block should stay in the cache, yet a block should have work for all cores, and a power of
    two wastes least of a long sequence (`benchmarks.kernels.block_sizes`). Elsewhere large blocks fill matrix units.
    """
    if jax.default_backend() != "cpu":
        return 512, 512
    return 256, 128


def even_block(length: int, most: int) -> int:
    """The size of as few equal blocks of at most `most` tokens as hold `length`, a multiple of 16 where there are two.

    >>> even_block(300, 256), even_block(2048, 256), even_block(7, 256)
    (160, 256, 7)
    """
    if length <= most:
        return length
    return min(-(-even_size(length, most) // 16) * 16, most)


def forward(blocks: Blocks, queries: Queries, keys: Keys) -> tuple[Float[Array, "B K G C D"], Float[Array, "B K G C"]]:
    """Softmax output and log-sum-exp of the logits, in the accumulator's dtype; 0 and -inf where nothing is seen."""
    b, heads, group, length, width = queries.q.shape
    dtype = accumulator(queries.q.dtype)

    def block(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        def body(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, total, top = state
            logits, _ = _logits(blocks, queries, keys, i, j)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            safe = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
            weights = jnp.exp(logits - safe[..., None])
            shrink = jnp.exp(top - safe)
            v = _take(keys.v, keys.row, j, blocks.block_k)
            add = jnp.einsum("bkgts,bksd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=dtype)
            return out * shrink[..., None] + add, total * shrink + jnp.sum(weights, axis=-1), new_top

        rows = (b, heads, group, blocks.block_q)
        start = (jnp.zeros((*rows, width), dtype), jnp.zeros(rows, dtype), jnp.full(rows, -jnp.inf, dtype))
        out, total, top = _over_keys(blocks, queries, keys, i, body, start)
        some = total > 0
        divisor = jnp.where(some, total, 1.0)
        lse = jnp.where(some, top + jnp.log(divisor), -jnp.inf)
        at = i * blocks.block_q
        return (
            jax.lax.dynamic_update_slice_in_dim(carry[0], out / divisor[..., None], at, 3),
            jax.lax.dynamic_update_slice_in_dim(carry[1], lse, at, 3),
        )

    empty = jnp.zeros((b, heads, group, length, width), dtype), jnp.zeros((b, heads, group, length), dtype)
    return jax.lax.fori_loop(0, length // blocks.block_q, block, empty)


def backward(
    blocks: Blocks,
    queries: Queries,
    keys: Keys,
    lse: Float[Array, "B K G C"],
    d_out: Float[Array, "B K G C D"],
    shift: Float[Array, "B K G C"],
    d_k: Float[Array, "R B K S D"],
    d_v: Float[Array, "R B K S D"],
) -> tuple[Float[Array, "B K G C D"], Float[Array, "R B K S D"], Float[Array, "R B K S D"]]:
    """Gradient of the queries, and `d_k`, `d_v` with the gradients of these queries' keys and values added.

    Args:
      blocks, queries, keys: of the forward pass.
      lse: what the forward pass returned.
      d_out: cotangent of the output.
      shift: cotangent of `lse` minus the sum over channels of `d_out * out`.
      d_k, d_v: gradients so far, of any float dtype; only the visited slots of `keys.row` change.
    """
    dtype = accumulator(queries.q.dtype)
    safe = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # queries that saw nothing get probabilities of 0

    def block(i: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        at = i * blocks.block_q
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=blocks.block_q, axis=3)
        q, d_o, row_lse, row_shift = take(queries.q), take(d_out), take(safe), take(shift)

        def body(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k, d_v = state
            logits, slope = _logits(blocks, queries, keys, i, j)
            weights = jnp.exp(logits - row_lse[..., None])
            k, v = (_take(x, keys.row, j, blocks.block_k) for x in (keys.k, keys.v))
            d_weights = jnp.einsum("bkgtd,bksd->bkgts", d_o.astype(v.dtype), v, preferred_element_type=dtype)
            d_dots = (weights * (d_weights + row_shift[..., None]) * slope).astype(q.dtype)
            d_q = d_q + jnp.einsum("bkgts,bksd->bkgtd", d_dots, k, preferred_element_type=dtype)
            add_k = jnp.einsum("bkgtd,bkgts->bkds", q, d_dots, preferred_element_type=dtype)
            probabilities = weights.astype(v.dtype)
            add_v = jnp.einsum("bkgtd,bkgts->bkds", d_o.astype(v.dtype), probabilities, preferred_element_type=dtype)
            add_k, add_v = jnp.swapaxes(add_k, 2, 3), jnp.swapaxes(add_v, 2, 3)
            return d_q, _add(d_k, add_k, keys.row, j), _add(d_v, add_v, keys.row, j)

        d_q, d_k, d_v = grads
        block_dq, d_k, d_v = _over_keys(blocks, queries, keys, i, body, (jnp.zeros(q.shape, dtype), d_k, d_v))
        return jax.lax.dynamic_update_slice_in_dim(d_q, block_dq, at, 3), d_k, d_v

    d_q = jnp.zeros(queries.q.shape, dtype)
    return jax.lax.fori_loop(0, queries.q.shape[3] // blocks.block_q, block, (d_q, d_k, d_v))


def _logits(blocks: Blocks, queries: Queries, keys: Keys, i: Array, j: Array) -> tuple[Array, Array]:
    """Masked logits of query block i and key block j, [B, K, G, bq, bk], and d(logits)/d(dot product)."""
    q = jax.lax.dynamic_slice_in_dim(queries.q, i * blocks.block_q, blocks.block_q, 3)
    k = _take(keys.k, keys.row, j, blocks.block_k)
    dots = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=accumulator(q.dtype))
    logits, slope = dots * blocks.scale, jnp.asarray(blocks.scale, dots.dtype)
    if blocks.softcap is not None:
        squashed = jnp.tanh(logits / blocks.softcap)
        logits, slope = blocks.softcap * squashed, slope * (1.0 - jnp.square(squashed))
    query = queries.offset + i * blocks.block_q + jnp.arange(blocks.block_q)[:, None]
    key, held = _key_index(blocks, keys, j)
    if queries.slopes is not None:
        logits = logits - queries.slopes[..., None, None].astype(logits.dtype) * (query - key).astype(logits.dtype)
    visible = (blocks.pattern.mask(query, key) & held)[None]
    if queries.segments is not None and keys.segments is not None:
        ids_q = jax.lax.dynamic_slice_in_dim(queries.segments, i * blocks.block_q, blocks.block_q, 1)
        ids_k = jax.lax.dynamic_slice_in_dim(keys.segments, j * blocks.block_k, blocks.block_k, 1)
        visible = visible & (ids_q[:, :, None] == ids_k[:, None, :])
    return jnp.where(visible[:, None, None], logits, -jnp.inf), slope


def _key_index(blocks: Blocks, keys: Keys, j: Array) -> tuple[Int[Array, "1 s"], Bool[Array, "1 s"]]:
    """Indices of the keys in block j, and which of its slots hold one."""
    slot = j * blocks.block_k + jnp.arange(blocks.block_k)[None]
    index = slot - blocks.leading + keys.base
    held = (slot < keys.stop) & (index >= blocks.leading)
    if blocks.leading:
        index, held = jnp.where(slot < blocks.leading, slot, index), held | (slot < blocks.leading)
    return index, held


def _over_keys(blocks: Blocks, queries: Queries, keys: Keys, i: Array, body: Any, carry: Any) -> Any:
    """Run `body(j, carry)` for every key block j that query block i can see: leading sinks, then the range."""
    first = queries.offset + i * blocks.block_q
    last = first + blocks.block_q - 1
    low, high = blocks.pattern.key_range(first, last)
    to_slot = blocks.leading - keys.base
    count = keys.k.shape[3] // blocks.block_k
    high = jnp.minimum(high + to_slot, keys.stop)
    high = jnp.clip((high + blocks.block_k - 1) // blocks.block_k, 0, count)
    low = jnp.clip((jnp.maximum(low, blocks.leading) + to_slot) // blocks.block_k, 0, high)
    if blocks.pattern.sinks:
        sinks = (jnp.minimum(blocks.pattern.sinks, last + 1) + blocks.block_k - 1) // blocks.block_k
        carry = jax.lax.fori_loop(0, jnp.minimum(sinks, low), body, carry)
    return jax.lax.fori_loop(low, high, body, carry)


def _take(buffer: Float[Array, "R B K S D"], row: Any, j: Array, size: int) -> Float[Array, "B K s D"]:
    """Block j of a layer's slots."""
    _, b, heads, _, width = buffer.shape
    return jax.lax.dynamic_slice(buffer, _slice_start(row, j, size), (1, b, heads, size, width))[0]


def _add(total: Float[Array, "R B K S D"], part: Float[Array, "B K s D"], row: Any, j: Array) -> Array:
    """Add `part` to block j of a layer's slots."""
    size = part.shape[2]
    new = (_take(total, row, j, size) + part).astype(total.dtype)
    return jax.lax.dynamic_update_slice(total, new[None], _slice_start(row, j, size))


def _slice_start(row: Any, j: Array, size: int) -> tuple[Array, ...]:
    return tuple(jnp.asarray(index, jnp.int32) for index in (row, 0, 0, j * size, 0))
