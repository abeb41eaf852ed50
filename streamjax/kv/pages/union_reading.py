"""Reading pages that every query has chosen by itself: each page once for a run of neighbouring queries.

Neighbouring tokens want much the same pages. To gather them for every query by itself moves far more bytes than the
attention takes arithmetic. Here the pages that any of `QUERIES` neighbours has chosen are gathered once, and a mask
says which query reads which of them: the result is that of the choices, whatever the neighbours are. Of pages in which
many slots are empty, units that hold tokens are gathered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32, Shaped

from pallas_kernels.partial import Partial, merge
from streamjax.attention.block_cutting import cut_blocks, join_blocks
from streamjax.attention.dense import attend
from streamjax.barriers import materialized_once
from streamjax.kv.codecs.slots import CodedSlots, Slots
from streamjax.kv.pages.selection import PageTokens, gather_pages, parted
from streamjax.kv.query import Query

QUERIES = 64  # neighbours that read together
SLOTS = 512  # slots that are gathered at a time, whole pages

Gather = Callable[[Int32[Array, "B K N"]], tuple[Slots, Slots, Array, Array]]
Choose = Callable[[Query], Bool[Array, "B #K C P"]]


def read_by_neighbours(
    query: Query, read: Callable[..., Partial], *each: Shaped[Array, "B C ..."], together: int = QUERIES
) -> Partial:
    """What `read` gives for runs of so many queries, which know what of them is padding, and their part of `each`."""
    width = query.q.shape[1]
    together = min(together, width)
    if together == width:
        return read(query, *each)
    asks = jnp.ones(query.q.shape[:2], bool) if query.valid is None else query.valid
    own = {"q": query.q, "raw_q": query.raw_q, "position": query.position, "valid": asks, "back": query.back}
    pieces = {name: None if x is None else cut_blocks(x, together) for name, x in own.items()}
    more = tuple(cut_blocks(x, together) for x in each)
    parts = jax.lax.map(lambda piece: read(dataclasses.replace(query, **piece[0]), *piece[1]), (pieces, more))
    return Partial(*(join_blocks(x, width) for x in parts))


def read_union(pages: PageTokens, query: Query, choose: Choose, unit: int | None = None) -> Partial:
    """Attention of each query to the pages that it chooses; they are gathered by `unit` slots, or whole."""
    heads, size = pages.k.shape[1], pages.position.shape[3]
    settled, waiting = parted(pages)
    units = None if unit is None else in_units(settled, unit)

    def read_together(query: Query) -> Partial:
        wants = choose(query)
        if units is None:
            part = read_union_of_neighbours(lambda page: gather_pages(settled, page), query, wants, heads, size)
        else:
            part = read_union_of_neighbours(
                lambda place: gather_pages(units, place), query, wants, heads, units.position.shape[3],
                units.valid.any(axis=3),
            )  # fmt: skip
        if waiting is None:
            return part
        theirs = jnp.take_along_axis(wants, waiting.page[:, None, None], axis=3, mode="clip")
        return merge(part, waiting.read(query, theirs))

    return read_by_neighbours(query, read_together)


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
    gather: Gather,
    query: Query,
    wants: Bool[Array, "B #K C P"],
    heads: int,
    size: int,
    there: Bool[Array, "B #K N"] | None = None,
) -> Partial:
    """Attention of queries that all read together, each to the pages that it wants.

    Args:
      gather: the slots of some units of each key head in a row: keys, values, positions, and which hold tokens.
      query, wants: C queries, and what each has chosen.
      heads: key heads.
      size: slots of a unit.
      there: which units hold tokens, as many for each page, page by page. Units are pages where None.
    """
    units = wants.shape[3] if there is None else there.shape[2]
    parts = units // wants.shape[3]
    tile = min(max(SLOTS // size, 1), units)
    if query.valid is not None:  # padding wants nothing
        wants &= query.valid[:, None, :, None]
    wanted = wants.any(axis=2)
    if there is not None:
        wanted = jnp.repeat(wanted, parts, axis=2) & there
    order = jnp.broadcast_to(_first_of(wanted), (wanted.shape[0], heads, units))

    def some(turn: Array, part: Partial) -> Partial:
        start = jnp.minimum(turn * tile, units - tile)  # the last tile is moved back to fit
        fresh = start + jnp.arange(tile) >= turn * tile
        place = jax.lax.dynamic_slice_in_dim(order, start, tile, 2)
        k, v, position, valid = gather(place)
        reads = jnp.take_along_axis(wants, place[:, :, None] // parts, axis=3, mode="clip") & fresh
        if isinstance(k, CodedSlots) or query.slopes is not None or query.back is not None:
            found = query.attend(k, v, position, jnp.repeat(reads, size, axis=3) & valid[:, :, None])
        else:  # what lies in pages comes before all queries: nobody asks how far
            found = attend_units(query, k, v, reads, valid.reshape(*valid.shape[:2], tile, size))
        return merge(part, found)

    most = jnp.max(jnp.sum(wanted, axis=-1, dtype=jnp.int32))
    return jax.lax.fori_loop(0, (most + tile - 1) // tile, some, query.nothing())


def _first_of(wanted: Bool[Array, "*B N"]) -> Int32[Array, "*B N"]:
    """The places in each row, those that are wanted first, each in its order. A sort of one list is a fast one."""
    total = wanted.shape[-1]
    place = jnp.arange(total, dtype=jnp.int32)
    return jnp.sort(jnp.where(wanted, place, place + total), axis=-1, stable=False) % total


def attend_units(
    query: Query,
    k: Float[Array, "B K M D"],
    v: Float[Array, "B K M V"],
    reads: Bool[Array, "B K C N"],
    valid: Bool[Array, "B #K N S"],
) -> Partial:
    """Attention to N units of S slots in a row: a query to the tokens of those that it reads.

    Whom a query reads is said once a unit and not once a slot: as long as it is, the mask would cost more than softmax.
    """
    k = materialized_once(k, query.seen)
    visible = reads[:, :, None, :, :, None] & valid[:, :, None, None]
    return attend(query.q, k, v if v.shape[-1] else k, visible, scale=query.scale, softcap=query.softcap)
