"""Attention inside chosen pages, each by a softmax of its own, summed with given weights: three forms of one sum.

Over all pages with most weights zero, which is products of matrices; over gathered pages, whose work does not grow with
the context; and the platform's kernel, which sorts queries by the pages that they chose, so that its work is products
of matrices and does not grow with the context either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from pallas_kernels import api
from pallas_kernels.api import platforms
from pallas_kernels.argument_checks import DTYPES
from pallas_kernels.partial import accumulator
from streamjax.attention.block_cutting import cut_blocks, join_blocks
from streamjax.attention.landmarks.page_choice import VisiblePages, choose

QUERY_BLOCK = 128  # queries whose logits exist at a time
GATHERED = 2**23  # keys times channels that are gathered at a time
DENSE_CHUNKS = 8  # the dense form works on at most so many times more pages than are chosen


def choose_in_blocks(
    landmarks: Float[Array, "B K P D"], retrieval: Float[Array, "B C K D"], visible: VisiblePages, top_k: int
) -> tuple[Int32[Array, "B C K top_k"], Float[Array, "B C K top_k"]]:
    """Pages that each query reads, -1 for none, and their weights; `page_choice.choose` for some queries at a time."""
    rows, heads, count, _ = landmarks.shape
    if not count:
        none = jnp.full((rows, retrieval.shape[1], heads, top_k), -1, jnp.int32)
        return none, jnp.zeros_like(none, accumulator(retrieval.dtype))

    def best(retrieval: Array, seen: VisiblePages) -> tuple[Array, Array]:
        chosen, weights = choose(landmarks, retrieval, seen, min(top_k, count))
        chosen = jnp.where(weights > 0, chosen, -1)
        return jnp.swapaxes(chosen, 1, 2), jnp.swapaxes(weights, 1, 2)

    chosen, weights = by_blocks(best, QUERY_BLOCK, (retrieval,), visible)
    missing = ((0, 0), (0, 0), (0, 0), (0, top_k - chosen.shape[3]))
    return jnp.pad(chosen, missing, constant_values=-1), jnp.pad(weights, missing)


def kernel_pays(q: Float[Array, "B C H D"], k: Float[Array, "B K P S D"], count: int, top_k: int) -> bool:
    """Whether there is a kernel, and it beats the others: there are too many pages to work with all of them, but not
    so many that none has two readers.

    Args:
      q, k: queries, and keys of some or all pages.
      count: how many pages there are.
      top_k: how many of them a query reads.
    """
    if not q.shape[1] * min(top_k, count) >= count > DENSE_CHUNKS * top_k or k.shape[3] % (32 // k.dtype.itemsize):
        return False
    return platforms.platform_implementation() is not None and q.dtype == k.dtype and q.dtype.name in DTYPES


def attend_by_kernel(
    scale: float,
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K P S D"],
    v: Float[Array, "B K P S D"],
    chosen: Int32[Array, "B C K n"],
    weights: Float[Array, "B C K n"],
) -> Float[Array, "B C H D"]:
    """By the platform's kernel; a page of -1 is none."""
    chosen, weights = (jnp.swapaxes(x, 1, 2) for x in (chosen, weights))
    return api.hsa_attention(q, k, v, chosen, weights, scale=scale)


def attend_dense(
    scale: float,
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K P S D"],
    v: Float[Array, "B K P S D"],
    chosen: Int32[Array, "B C K n"],
    weights: Float[Array, "B C K n"],
) -> Float[Array, "B C H D"]:
    """Over all pages, those that are not chosen with a weight of zero."""
    return by_blocks(partial(_dense, scale, k, v), QUERY_BLOCK, (q, chosen, weights))


def attend_gathered(
    scale: float,
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K P S D"],
    v: Float[Array, "B K P S D"],
    chosen: Int32[Array, "B C K n"],
    weights: Float[Array, "B C K n"],
) -> Float[Array, "B C H D"]:
    """Over the chosen pages alone."""
    rows, heads, _, size, channels = k.shape
    block = max(1, min(QUERY_BLOCK, GATHERED // (rows * heads * chosen.shape[3] * size * channels)))
    return by_blocks(partial(_gathered, scale, k, v), block, (q, chosen, weights))


def by_blocks(
    function: Callable[..., Any], size: int, queries: tuple[Array, ...], visible: VisiblePages | None = None
) -> Any:
    """`function(*queries)`, with `visible` behind them if there is one, for `size` queries at a time.

    Its results have queries second, as its arguments have.
    """
    width, function = queries[0].shape[1], jax.checkpoint(function)
    seen = None if visible is None else (visible.limit, visible.segments)

    def piece(x: tuple[tuple[Array, ...], Any]) -> Any:
        if visible is None:
            return function(*x[0])
        return function(*x[0], dataclasses.replace(visible, limit=x[1][0], segments=x[1][1]))

    if width <= size:
        return piece((queries, seen))
    cut = jax.tree.map(lambda x: cut_blocks(x, size), (queries, seen))
    return jax.tree.map(lambda x: join_blocks(x, width), jax.lax.map(piece, cut))


def _dense(scale: float, k: Array, v: Array, q: Array, chosen: Array, weights: Array) -> Float[Array, "B C H D"]:
    dtype, heads, count = accumulator(q.dtype), k.shape[1], k.shape[2]
    chosen, weights = (jnp.swapaxes(x, 1, 2) for x in (jnp.where(chosen < 0, count, chosen), weights))
    spread = jnp.zeros((*chosen.shape[:-1], count), dtype)
    spread = jnp.put_along_axis(spread, chosen, weights, axis=-1, inplace=False, mode="drop")
    grouped = rearrange(q, "b c (k g) d -> b k g c d", k=heads)
    logits = jnp.einsum("bkgcd,bkpsd->bkgcps", grouped, k, preferred_element_type=dtype) * scale
    attention = jax.nn.softmax(logits, axis=-1) * spread[:, :, None, :, :, None]
    out = jnp.einsum("bkgcps,bkpsd->bckgd", attention.astype(q.dtype), v, preferred_element_type=dtype)
    return rearrange(out, "b c k g d -> b c (k g) d")


def _gathered(scale: float, k: Array, v: Array, q: Array, chosen: Array, weights: Array) -> Float[Array, "B C H D"]:
    dtype, heads, top_k = accumulator(q.dtype), k.shape[1], chosen.shape[3]
    flat = rearrange(jnp.maximum(chosen, 0), "b c k n -> b k (c n) 1 1")

    def take(x: Array) -> Array:
        found = jnp.take_along_axis(x, flat, axis=2, mode="clip")
        return rearrange(found, "b k (c n) s d -> b k c n s d", n=top_k)

    grouped = rearrange(q, "b c (k g) d -> b k g c d", k=heads)
    logits = jnp.einsum("bkgcd,bkcnsd->bkgcns", grouped, take(k), preferred_element_type=dtype) * scale
    attention = jax.nn.softmax(logits, axis=-1) * rearrange(weights, "b c k n -> b k 1 c n 1")
    out = jnp.einsum("bkgcns,bkcnsd->bckgd", attention.astype(q.dtype), take(v), preferred_element_type=dtype)
    return rearrange(out, "b c k g d -> b c (k g) d")
