"""States whose pages lie in a pool: what each stream has by itself and the pool apart, and moved to the host."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32, Shaped

from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.pages.page_pool import PagePool, PageTables, PoolState
from streamjax.kv.tiers.full import Full
from streamjax.serving.row_states import ParkedState
from streamjax.streaming.state import StreamState

AT_ONCE = 512  # tokens that are moved between pages and the host at a time


class Pool(NamedTuple):
    """Keys and values of one layer's pages, [K, P, S, D], on the device or in the host's memory."""

    k: Any
    v: Any


Pools = tuple[Pool, ...]  # of the layers that have one, in their order


def keeps_all(cache: Cache) -> bool:
    """Whether a cache keeps every token as it came, so that its tokens may lie in pages."""
    return isinstance(cache, Cascade) and [type(tier) for tier in cache.tiers] == [Full] and not _codec(cache)


def _codec(cache: Cascade) -> bool:
    tier = cache.tiers[0]
    return isinstance(tier, Full) and tier.codec is not None


def in_pool(caches: Sequence[Cache], pages: int, page_size: int) -> list[Cache]:
    """The caches, with a pool in the place of those that keep all."""
    return [PagePool(cache.slots, pages, page_size) if keeps_all(cache) else cache for cache in caches]


def split(state: StreamState) -> tuple[StreamState, Pools]:
    """What a batch's streams have by themselves, and the pools."""
    pools = tuple(Pool(own.k, own.v) for own in state.layers if isinstance(own, PoolState))
    layers = tuple(
        dataclasses.replace(own, k=None, v=None) if isinstance(own, PoolState) else own for own in state.layers
    )
    return dataclasses.replace(state, layers=layers, tables=None), pools


def join(state: StreamState, pools: Pools, tables: PageTables) -> StreamState:
    """Both together, with the tables by which the streams find their pages."""
    rest = iter(pools)
    layers = tuple(PoolState(*next(rest), own.filled) if isinstance(own, PoolState) else own for own in state.layers)
    return dataclasses.replace(state, layers=layers, tables=tables)


@jax.jit
def take_pages(pools: Pools, pages: Int32[Array, " n"]) -> Pools:
    """Copies of pages."""
    return jax.tree.map(lambda x: x[:, pages], pools)


@partial(jax.jit, donate_argnames="pools")
def put_pages(pools: Pools, pages: Int32[Array, " n"], content: Pools) -> Pools:
    """The pools with these contents of pages; those whose number is past the end are left out. They are donated."""
    return jax.tree.map(lambda x, new: x.at[:, pages].set(new, mode="drop"), pools, content)


def read_pages(pools: Pools, pages: Sequence[int], length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first `length` tokens of a stream that has these pages: of each pool keys and values, [1, K, length, D]."""
    size = pools[0].k.shape[2]
    found = [
        jax.tree.map(np.asarray, take_pages(pools, _padded(part, size, 0))) for part in _parts(pages, size)
    ]  # each [K, n, S, D]

    def whole(layer: int, index: int) -> np.ndarray:
        heads, _, _, width = pools[layer][index].shape
        if not found:
            return np.zeros((1, heads, 0, width), pools[layer][index].dtype)
        parts = [part[layer][index].reshape(1, heads, -1, width) for part in found]
        return np.concatenate(parts, axis=2)[:, :, :length]

    return [(whole(layer, 0), whole(layer, 1)) for layer in range(len(pools))]


def write_pages(pools: Pools, pages: Sequence[int], tokens: Sequence[tuple[np.ndarray, np.ndarray]]) -> Pools:
    """The pools, in which these pages hold tokens as `read_pages` gives them. They are donated."""
    size, count = pools[0].k.shape[2], pools[0].k.shape[1]
    start = 0
    for part in _parts(pages, size):
        numbers = _padded(part, size, count)
        width = len(numbers) * size

        def cut(x: np.ndarray, start: int = start, width: int = width) -> Shaped[np.ndarray, "K n S D"]:
            piece = x[0, :, start : start + width]
            piece = np.pad(piece, ((0, 0), (0, width - piece.shape[1]), (0, 0)))
            return piece.reshape(piece.shape[0], -1, size, piece.shape[2])

        pools = put_pages(pools, numbers, tuple(Pool(cut(k), cut(v)) for k, v in tokens))
        start += width
    return pools


def _parts(pages: Sequence[int], size: int) -> list[Sequence[int]]:
    count = max(AT_ONCE // size, 1)
    return [pages[i : i + count] for i in range(0, len(pages), count)]


def _padded(pages: Sequence[int], size: int, rest: int) -> Int32[np.ndarray, " n"]:
    """Page numbers of one width, so that one program moves all."""
    found = np.full(max(AT_ONCE // size, 1), rest, np.int32)
    found[: len(pages)] = pages
    return found


def as_dense(state: StreamState, tokens: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Array | np.ndarray]:
    """The arrays of a stream of one row, as a state without pages has them, without the empty slots."""
    rest = iter(tokens)
    first = np.asarray(state.position)[0] - np.asarray(state.seen)[0].astype(np.uint32)
    leaves: list[Array | np.ndarray] = []
    for own in state.layers:
        if isinstance(own, PoolState):
            k, v = next(rest)
            position = (first + np.arange(k.shape[2], dtype=np.uint32))[None, None]
            leaves += [k, v, position, own.filled]
        else:
            leaves += jax.tree.leaves(own)
    return leaves + jax.tree.leaves(dataclasses.replace(state, layers=()))


def from_dense(
    parked: ParkedState, counts: Sequence[int], caches: Sequence[Cache]
) -> tuple[ParkedState, list[tuple[np.ndarray, np.ndarray]], int]:
    """The other way, for a parked stream whose layers have so many arrays each.

    Returns:
      What the stream has by itself in these caches, its tokens, and how many they are.
    """
    rest, own, tokens, held = iter(parked.arrays), [], [], 0
    for cache, count in zip(caches, counts, strict=True):
        arrays = list(itertools.islice(rest, count))
        if isinstance(cache, PagePool):
            k, v, _, filled = arrays
            tokens.append((k, v))
            held, arrays = int(filled[0]), [filled]
        own += arrays
    return ParkedState((*own, *rest)), tokens, held
