"""Attention inside chosen pages as pairs of a query and a page: work for those choices that are there.

While pages go round, a device reads those whose page is passing, some at a time, in a loop that is as long as there are
such pairs: over all turns its work is that of its own choices, however many turns there are. What it gathers at a time
is bounded. JAX has no gradient for a loop of that kind, so this has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import accumulator
from streamjax.attention.context.blocks import constants
from streamjax.attention.landmarks.page_forms import GATHERED


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_pairs(
    scale: float,
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K P S D"],
    v: Float[Array, "B K P S D"],
    chosen: Int32[Array, "B C K n"],
    weights: Float[Array, "B C K n"],
) -> Float[Array, "B C H D"]:
    """The sum of `landmarks.page_forms`, of pages of which most queries chose none; those of -1 are none."""
    return _forward(scale, q, k, v, chosen, weights)[0]


class _Tile(NamedTuple):
    """R pairs of each row and key head; a weight of 0 where there are no more. at: their numbers among all choices."""

    at: Int32[Array, "B K R"]
    query: Int32[Array, "B K R"]
    page: Int32[Array, "B K R"]
    weight: Float[Array, "B K R"]


def _forward(scale: float, q: Array, k: Array, v: Array, chosen: Array, weights: Array) -> tuple[Array, Any]:
    grouped = rearrange(q, "b c (k g) d -> b k c g d", k=k.shape[1])

    def add(out: Array, tile: _Tile) -> Array:
        arrays = _take(grouped, tile.query), _take(k, tile.page), _take(v, tile.page), tile.weight
        return _add(out, tile.query, _inside(scale, *arrays))

    out = _over_tiles(k, chosen, weights, jnp.zeros(grouped.shape, accumulator(q.dtype)), add)
    return rearrange(out, "b k c g d -> b c (k g) d"), (q, k, v, chosen, weights)


def _backward(scale: float, saved: Any, d_out: Float[Array, "B C H D"]) -> tuple[Any, ...]:
    q, k, v, chosen, weights = saved
    grouped, d_grouped = (rearrange(x, "b c (k g) d -> b k c g d", k=k.shape[1]) for x in (q, d_out))

    def add(sums: tuple[Array, ...], tile: _Tile) -> tuple[Array, ...]:
        arrays = _take(grouped, tile.query), _take(k, tile.page), _take(v, tile.page), tile.weight
        _, back = jax.vjp(partial(_inside, scale), *arrays)
        places = tile.query, tile.page, tile.page, tile.at
        d_q, d_k, d_v, d_weight = back(_take(d_grouped, tile.query))
        found = d_q, d_k, d_v, jnp.where(tile.weight > 0, d_weight, 0)
        return tuple(map(_add, sums, places, found))

    flat = (*weights.shape[:1], k.shape[1], weights.shape[1] * weights.shape[3])
    shapes = grouped.shape, k.shape, v.shape, flat
    nothing = tuple(jnp.zeros(shape, accumulator(q.dtype)) for shape in shapes)
    d_q, d_k, d_v, d_weights = _over_tiles(k, chosen, weights, nothing, add)
    d_q = rearrange(d_q, "b k c g d -> b c (k g) d").astype(q.dtype)
    d_weights = rearrange(d_weights, "b k (c n) -> b c k n", n=weights.shape[3]).astype(weights.dtype)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), constants(chosen)[0], d_weights


attend_pairs.defvjp(_forward, _backward)


def _over_tiles(
    k: Float[Array, "B K P S D"],
    chosen: Int32[Array, "B C K n"],
    weights: Float[Array, "B C K n"],
    carry: Any,
    add: Callable[[Any, _Tile], Any],
) -> Any:
    """`carry` behind all tiles of pairs."""
    rows, heads, _, size, channels = k.shape
    page, weight = (rearrange(x, "b c k n -> b k (c n)") for x in (chosen, weights))
    total, there = page.shape[2], page >= 0
    most = min(max(1, GATHERED // (rows * heads * size * channels)), total)
    count = jnp.sum(there, axis=2, dtype=jnp.int32)
    place = jnp.where(there, jnp.cumsum(there, axis=2, dtype=jnp.int32) - 1, total)  # of a pair among those there are
    number = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), place.shape)
    numbers = jnp.put_along_axis(jnp.zeros_like(number), place, number, axis=2, inplace=False, mode="drop")

    def one(turn: Array, carry: Any) -> Any:
        place = turn * most + jnp.arange(most, dtype=jnp.int32)
        at = numbers[:, :, jnp.minimum(place, total - 1)]
        here = place < count[..., None]
        own_page, own_weight = (jnp.where(here, jnp.take_along_axis(x, at, axis=2), 0) for x in (page, weight))
        return add(carry, _Tile(at, at // chosen.shape[3], own_page, own_weight))

    return jax.lax.fori_loop(0, (jnp.max(count) + most - 1) // most, one, carry)


def _inside(
    scale: float,
    q: Float[Array, "B K R G D"],
    k: Float[Array, "B K R S D"],
    v: Float[Array, "B K R S D"],
    weight: Float[Array, "B K R"],
) -> Float[Array, "B K R G D"]:
    """Attention of each pair's query to its page, times the pair's weight."""
    dtype = accumulator(q.dtype)
    logits = jnp.einsum("bkrgd,bkrsd->bkrgs", q, k, preferred_element_type=dtype) * scale
    attention = jax.nn.softmax(logits, axis=-1) * weight[..., None, None]
    return jnp.einsum("bkrgs,bkrsd->bkrgd", attention.astype(q.dtype), v, preferred_element_type=dtype)


def _take(x: Array, index: Int32[Array, "B K R"]) -> Array:
    """Elements of axis 2."""
    return jax.vmap(jax.vmap(lambda x, index: x[index]))(x, index)


def _add(x: Array, index: Int32[Array, "B K R"], more: Array) -> Array:
    """`x` with more at some places of axis 2, which may be named several times."""
    return jax.vmap(jax.vmap(lambda x, index, more: x.at[index].add(more.astype(x.dtype))))(x, index, more)
