"""Pairs of a query and a page that it chose, in the order of the pages and cut into tiles of one page each.

What a kernel works on is a tile: some queries and the one page that all of them chose, so that their attention is a
product of two dense matrices. Every page's run of pairs begins a tile of its own and is filled up with none, as the
experts' runs are in grouped products of mixtures of experts (MegaBlocks, 2211.15841). How many tiles there are depends
on the choices; how many there can be does not.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


class Tiles(NamedTuple):
    """Tiles of pairs; pair n * C + c of a row is the n-th choice of query c. Leading axes: independent rows.

    page: of each tile; of those behind the last one that holds something: its page, again (0 where there is none).
    pair: numbers of the pairs of each tile; -1 behind its last one.
    filled: pairs of each tile.
    total: how many tiles hold something; they come first.
    first: of each page the number of its first tile, and `total` behind the last page.
    place: of each pair its place in the tiles, tile * block + row; -1 for a choice of none.
    """

    page: Int32[Array, "*A tiles"]
    pair: Int32[Array, "*A tiles block"]
    filled: Int32[Array, "*A tiles"]
    total: Int32[Array, "*A"]
    first: Int32[Array, "*A pages"]
    place: Int32[Array, "*A pairs"]


def most_tiles(pairs: int, pages: int, block: int) -> int:
    """How many tiles there may be, whatever is chosen; at least 1."""
    runs = min(pairs, pages)  # pages that somebody chose; each has one tile that may not be full
    return max(1, runs + (pairs - runs) // block)


def tiles(chosen: Int32[Array, "*A C N"], pages: int, block: int) -> Tiles:
    """Sort choices, page numbers below `pages` or negative for none, into tiles of `block` pairs."""
    leading = chosen.shape[:-2]
    # Queries last: a TPU's compiler takes half a minute to merge axes of which the last is as short as N.
    flat = jnp.swapaxes(chosen, -1, -2).reshape(-1, chosen.shape[-2] * chosen.shape[-1])
    found = jax.vmap(lambda row: _tiles(row, pages, block))(flat)
    return Tiles(*(x.reshape(*leading, *x.shape[1:]) for x in found))


def _tiles(chosen: Int32[Array, " pairs"], pages: int, block: int) -> Tiles:
    pairs = chosen.shape[0]
    keys = jnp.where(chosen < 0, pages, chosen)
    order = stable_order(keys, pages + 1)
    start = jnp.searchsorted(keys[order], jnp.arange(pages + 1, dtype=jnp.int32)).astype(jnp.int32)
    sizes = jnp.diff(start)
    ends = jnp.cumsum((sizes + block - 1) // block, dtype=jnp.int32)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    total = first[-1]

    tile = jnp.arange(most_tiles(pairs, pages, block), dtype=jnp.int32)
    page = jnp.searchsorted(ends, jnp.clip(tile, 0, jnp.maximum(total - 1, 0)), side="right").astype(jnp.int32)
    page = jnp.minimum(page, pages - 1) if pages else page
    page = jnp.where(total > 0, page, 0)
    done = (tile - first[page]) * block  # pairs of the page in tiles before this one
    filled = jnp.where(tile < total, jnp.clip(sizes[page] - done, 0, block), 0)
    row = jnp.arange(block, dtype=jnp.int32)
    at = jnp.minimum((start[page] + done)[:, None] + row, pairs - 1)
    pair = jnp.where(row < filled[:, None], order[at], -1)

    rank = stable_order(order, pairs)
    mine = jnp.minimum(keys, pages - 1)
    place = jnp.where(chosen < 0, -1, first[mine] * block + rank - start[mine])
    return Tiles(page, pair, filled, total, first, place)


def stable_order(keys: Int32[Array, " n"], limit: int) -> Int32[Array, " n"]:
    """`jnp.argsort` of keys from 0 to limit - 1; of one array where key and index fit into 32 bits.

    To sort two arrays, stably, takes a TPU's compiler four times as long and the TPU itself more than that.
    """
    bits = max(keys.shape[0] - 1, 1).bit_length()
    if limit > 1 << (32 - bits):
        return jnp.argsort(keys, stable=True).astype(jnp.int32)
    index = jnp.arange(keys.shape[0], dtype=jnp.uint32)
    joined = jax.lax.sort((keys.astype(jnp.uint32) << bits) | index, is_stable=False)
    return (joined & jnp.uint32((1 << bits) - 1)).astype(jnp.int32)
