"""Reading pages that every query has chosen by itself: each page once for a run of neighbouring queries.

Neighbouring tokens want much the same pages. To gather them for every query by itself moves far more bytes than the
attention takes arithmetic. Here the pages that any of `QUERIES` neighbours has chosen are gathered once, and a mask
says which query reads which of them: the result is that of the choices, whatever the neighbours are. Of pages in which
many slots are empty, units that hold tokens are gathered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Int32

from pallas_kernels.partial import Partial, merge
from streamjax.attention.block_cutting import cut_blocks, join_blocks
from streamjax.kv.codecs.slots import Slots
from streamjax.kv.pages.selection import Choice, PageTokens, gather_pages, parted
from streamjax.kv.query import Query

QUERIES = 64  # neighbours that read together
SLOTS = 512  # slots that are gathered at a time, whole pages

Gather = Callable[[Int32[Array, "B K N"]], tuple[Slots, Slots, Array, Array]]


def read_union(pages: PageTokens, query: Query, choice: Choice, unit: int | None = None) -> Partial:
    """Attention of each query to the pages of its choice; they are gathered by `unit` slots, or whole."""
    heads, size = pages.k.shape[1], pages.position.shape[3]
    settled, waiting = parted(pages)
    units = None if unit is None else in_units(settled, unit)

    def read_together(query: Query, choice: Choice) -> Partial:
        if units is None:
            part = read_union_of_neighbours(lambda page: gather_pages(settled, page), query, choice, heads, size)
        else:
            part = read_union_of_neighbours(
                lambda place: gather_pages(units, place), query, choice, heads, units.position.shape[3],
                units.valid.any(axis=3),
            )  # fmt: skip
        if waiting is None:
            return part
        page = waiting.page[:, None, None]
        theirs = choice.has(page, jnp.take_along_axis(choice.scores, page, axis=3, mode="clip"))
        return merge(part, waiting.read(query, theirs))

    def cut(x: Array) -> Array:
        return jnp.swapaxes(cut_blocks(jnp.swapaxes(x, 1, 2), together), 2, 3)

    def read(piece: tuple[dict[str, Any], Choice]) -> Partial:
        return read_together(dataclasses.replace(query, **piece[0]), piece[1])

    width = query.q.shape[1]
    together = min(QUERIES, width)
    if together == width:
        return read_together(query, choice)
    asks = jnp.ones(query.q.shape[:2], bool) if query.valid is None else query.valid
    own = {"q": query.q, "raw_q": query.raw_q, "position": query.position, "valid": asks, "back": query.back}
    pieces = (
        {name: None if x is None else cut_blocks(x, together) for name, x in own.items()},
        Choice(*map(cut, choice)),
    )
    return Partial(*(join_blocks(x, width) for x in jax.lax.map(read, pieces)))


def read_held(pages: PageTokens, query: Query, unit: int) -> Partial:
    """Attention of each query to all pages, by units of `unit` slots that hold any token."""
    units, heads = in_units(pages, unit), pages.k.shape[1]
    there = units.valid.any(axis=3)
    total = there.shape[2]
    tile = min(max(SLOTS // unit, 1), total)
    order = jnp.broadcast_to(jnp.argsort(~there, axis=2, stable=True), (there.shape[0], heads, total)).astype(jnp.int32)

    def some(turn: Array, part: Partial) -> Partial:
        start = jnp.minimum(turn * tile, total - tile)  # the last tile is moved back to fit
        k, v, position, valid = gather_pages(units, jax.lax.dynamic_slice_in_dim(order, start, tile, 2))
        fresh = jnp.repeat(start + jnp.arange(tile) >= turn * tile, unit)
        return merge(part, query.attend(k, v, position, valid & fresh))

    most = jnp.max(jnp.sum(there, axis=2, dtype=jnp.int32))
    return jax.lax.fori_loop(0, (most + tile - 1) // tile, some, query.nothing())


def in_units(pages: PageTokens, unit: int) -> PageTokens:
    """Pages cut into more of `unit` slots."""
    return PageTokens(*(rearrange(x, "b k p (n s) ... -> b k (p n) s ...", s=unit) for x in pages))


def read_union_of_neighbours(
    gather: Gather, query: Query, choice: Choice, heads: int, size: int, there: Bool[Array, "B #K N"] | None = None
) -> Partial:
    """`read_union` for queries that all read together.

    Args:
      gather: the slots of some units of each key head in a row: keys, values, positions, and which hold tokens.
      query, choice: C queries, and what each has chosen.
      heads: key heads.
      size: slots of a unit.
      there: which units hold tokens, as many for each page, page by page. Units are pages where None.
    """
    units = choice.scores.shape[3] if there is None else there.shape[2]
    parts = units // choice.scores.shape[3]
    tile = min(max(SLOTS // size, 1), units)
    wants = choice.has(jnp.arange(choice.scores.shape[3], dtype=jnp.int32), choice.scores)
    if query.valid is not None:  # padding wants nothing
        wants &= query.valid[:, None, :, None]
    wanted = wants.any(axis=2)
    if there is not None:
        wanted = jnp.repeat(wanted, parts, axis=2) & there
    order = jnp.argsort(~wanted, axis=-1, stable=True).astype(jnp.int32)
    order = jnp.broadcast_to(order, (order.shape[0], heads, units))

    def some(turn: Array, part: Partial) -> Partial:
        start = jnp.minimum(turn * tile, units - tile)  # the last tile is moved back to fit
        fresh = start + jnp.arange(tile) >= turn * tile
        place = jax.lax.dynamic_slice_in_dim(order, start, tile, 2)
        k, v, position, valid = gather(place)
        reads = jnp.take_along_axis(wants, place[:, :, None] // parts, axis=3, mode="clip") & fresh
        reads = jnp.repeat(reads, size, axis=3) & valid[:, :, None]
        return merge(part, query.attend(k, v, position, reads))

    most = jnp.max(jnp.sum(wanted, axis=-1, dtype=jnp.int32))
    return jax.lax.fori_loop(0, (most + tile - 1) // tile, some, query.nothing())
