"""Hierarchical sparse attention of a sequence whose tokens lie over the mesh axis `context`.

Each device makes the pages that end in its stretch. Their landmarks are gathered, one vector for the keys and values of
a page. So each device chooses for its own queries among all pages that they see, and then the pages go round
(`page_ring`). To fetch chosen pages alone would move less only where few are chosen: with pages of S tokens, of which a
query reads `top_k`, a page has S * top_k / P readers on each of P devices on average, and some thousands are usual.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.api import platforms
from pallas_kernels.partial import accumulator
from streamjax.attention.context.exchange import AXIS, before, place
from streamjax.attention.context.page_pairs import attend_pairs
from streamjax.attention.context.page_ring import read_round
from streamjax.attention.landmarks.page_attention import Implementation, LandmarkPages
from streamjax.attention.landmarks.page_choice import VisiblePages
from streamjax.attention.landmarks.page_forms import (
    DENSE_CHUNKS,
    attend_by_kernel,
    attend_dense,
    choose_in_blocks,
    kernel_pays,
)
from streamjax.attention.sharded import a_key_head_for_each_device, are_stretches, context_shards, per_device_call


def room_for_pages(stretch: int, size: int) -> int:
    """Places for pages of `size` tokens on a device that has a stretch of the sequence.

    Example:
      >>> room_for_pages(12, 5)  # the stretch of tokens 12 .. 23 has the ends of two pages, 14 and 19
      3
    """
    return -(-stretch // size)


def cut_pages(x: Shaped[Array, "B T *E"], size: int) -> tuple[Shaped[Array, "B N S *E"], Int32[Array, "B N"]]:
    """Pages of `size` tokens, each where its last token lies, and their numbers.

    Every device has room for equally many. Where a stretch ends within a page, one place may be empty: its number is
    -1. For that up to `size - 1` tokens in front of a stretch come from the devices before it.
    """
    room = room_for_pages(x.shape[1] if are_stretches() else x.shape[1] // context_shards(x.shape[1]), size)

    def own(x: Array) -> tuple[Array, Array]:
        index, length = place()[0], x.shape[1]
        first, stop = index * length // size, (index + 1) * length // size
        number = first + jnp.arange(room, dtype=jnp.int32)
        number = jnp.broadcast_to(jnp.where(number < stop, number, -1), (x.shape[0], room))

        def cut(x: Array) -> Array:
            if length % size:
                behind = jnp.zeros_like(x, shape=(x.shape[0], size - 1, *x.shape[2:]))
                x = jnp.concatenate((before(x, size - 1), x, behind), axis=1)
                start = first * size - index * length + size - 1
                x = jax.lax.dynamic_slice_in_dim(x, start, room * size, 1)
            return rearrange(x, "b (n s) ... -> b n s ...", s=size)

        return cut(x), number

    tokens, channels = ("batch", "length"), (None,) * (x.ndim - 2)
    cut: tuple[Array, Array] = per_device_call(own, ((*tokens, *channels),), ((*tokens, None, *channels), tokens), (x,))
    return cut


def pages_over_devices(segments: Int32[Array, "B T"] | None, shape: tuple[int, ...], size: int) -> VisiblePages:
    """Which of the pages that `cut_pages` makes each token sees: those that are complete before it.

    Args:
      segments: of the tokens, where sequences are packed.
      shape: rows and tokens.
      size: tokens of a page.
    """
    cut, number = cut_pages(jnp.zeros(shape, jnp.int32) if segments is None else segments, size)
    first = place()[0] * shape[1] if are_stretches() else 0
    limit = jnp.asarray((first + jnp.arange(shape[1], dtype=jnp.int32)) // size, jnp.int32)
    of_pages = None if segments is None else jnp.where((cut == cut[:, :, :1]).all(axis=-1), cut[:, :, 0], -1)
    return VisiblePages(number, jnp.broadcast_to(limit, shape), segments, of_pages)


def read_over_devices(
    pages: LandmarkPages,
    q: Float[Array, "B T H D"],
    retrieval: Float[Array, "B T K D"],
    visible: VisiblePages,
    top_k: int,
    scale: float,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H D"]:
    """`LandmarkPages.read` of a sequence by its own pages, both of which lie over `context`.

    Args:
      pages: of all devices, in the order of devices; as many of each.
      q, retrieval, visible, top_k, scale: as there.
      implementation: as there, of the pages that are passing.
    """
    count = pages.k.shape[2]

    def own(
        q: Array, retrieval: Array, k: Array, v: Array, landmarks: Array, number: Array, limit: Array,
        segments: Array | None, of_pages: Array | None,
    ) -> Array:  # fmt: skip
        def of_all(x: Array, axis: int) -> Array:
            return jax.lax.all_gather(x, AXIS, axis=axis, tiled=True)

        dtype = landmarks.dtype  # gathered in that of sums, in which their gradients are then added up
        landmarks = of_all(landmarks.astype(accumulator(dtype)), 2).astype(dtype)
        seen = VisiblePages(of_all(number, 1), limit, segments, None if of_pages is None else of_all(of_pages, 1))
        chosen, weights = choose_in_blocks(landmarks, retrieval, seen, top_k)
        attend = _FORMS[implementation or _best_form(q, k, count, top_k)]
        return read_round(partial(attend, scale), q, (k, v), chosen, weights)

    heads = q.shape[2]
    retrieval = a_key_head_for_each_device(retrieval, heads)
    k, v, landmarks = (a_key_head_for_each_device(x, heads, 1) for x in (pages.k, pages.v, pages.landmarks))
    query, key, page = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None), ("batch", "slots")
    paged: Any = ("batch", "kv_heads", "slots", None, None)
    names = query, key, paged, paged, paged[:4], page, query[:2], query[:2], page
    arrays = q, retrieval, k, v, landmarks, visible.number, visible.limit, visible.segments, visible.of_chunks
    found: Array = per_device_call(own, names, query, arrays)
    return found


_FORMS: dict[str, Callable[..., Array]] = {
    "dense": attend_dense,
    "gathered": attend_pairs,
    "pallas": attend_by_kernel,
}


def _best_form(q: Array, k: Array, count: int, top_k: int) -> Implementation:
    """How to read what is passing, of `count` pages in all."""
    if kernel_pays(q, k, count, top_k):
        platforms.log_choice("hierarchical attention over many chunks", "pallas")
        return "pallas"
    return "gathered" if count > DENSE_CHUNKS * top_k else "dense"
