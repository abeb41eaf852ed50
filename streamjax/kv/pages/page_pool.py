"""`PagePool`: the tokens of many streams in one pool of pages, which a table finds (PagedAttention, 2309.06180).

A cache that keeps every token has room for its whole capacity in every row. Here a row has pages only for what it
holds, and rows that begin alike have the same pages for that. Pages that several rows share are read once for all of
their queries, and what comes of it is merged with what each row gets from its own (Hydragen, 2402.05099).

Which page is whose is the caller's business: tables are data, so nothing is compiled when they change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import Partial, add_sink_logits, merge
from streamjax.barriers import ordered_after
from streamjax.field_checks import Size, check_fields
from streamjax.kv.cache import Cache
from streamjax.kv.decode_kernels import decode_pool, decode_shared, kernel_reads_pool
from streamjax.kv.query import KVSpec, KVTokens, Query
from streamjax.kv.slots.ring_buffer import put_tokens

_TOGETHER = 512  # slots that are read at a time: what is gathered of them stays in a processor's cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTables:
    """Where B streams have their tokens: token i of a row is slot `i % page_size` of page `own[row, i // page_size]`.

    own: numbers of pages, -1 behind the last one. shared: pages that several rows have, all of them full, -1 behind the
    last. place: which page of its streams each of these is. sharers: the rows that have it. begins: how many of a row's
    first pages are among them.
    """

    own: Int32[Array, "B N"]
    shared: Int32[Array, " M"]
    place: Int32[Array, " M"]
    sharers: Bool[Array, "M B"]
    begins: Int32[Array, " B"]

    def map_axes(self, fn: Callable[[Any, Sequence[str | None]], Any]) -> PageTables:
        """A copy with `fn(array, logical names of its dimensions)` in the place of every array."""
        return PageTables(
            fn(self.own, ("batch", None)),
            fn(self.shared, (None,)),
            fn(self.place, (None,)),
            fn(self.sharers, (None, "batch")),
            fn(self.begins, ("batch",)),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PoolState:
    """k, v: P pages of S slots, which belong to no row; None where the pool is kept elsewhere. filled: tokens a row."""

    k: Float[Array, "K P S D"] | None
    v: Float[Array, "K P S V"] | None
    filled: Int32[Array, " B"]

    def map_axes(self, fn: Callable[[Any, Sequence[str | None]], Any]) -> PoolState:
        """A copy with `fn(array, logical names of its dimensions)` in the place of every array."""
        pool = ("kv_heads", None, None, "head_dim")
        k, v = (None if x is None else fn(x, pool) for x in (self.k, self.v))
        return PoolState(k, v, fn(self.filled, ("batch",)))


@dataclasses.dataclass(frozen=True)
class PagePool(Cache):
    """Keeps every token of each stream, up to `tokens`, in a pool of `pages` pages of `page_size` tokens.

    It computes what `Cascade(Full(tokens))` computes, but for the last bits of sums. Streams begin with no page, and
    need `StreamState.tables` that name enough of them before they are read.
    """

    alters_every: ClassVar[int | None] = None

    tokens: Size
    pages: Size
    page_size: Size

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def slots(self) -> int:
        return self.tokens

    @property
    def span(self) -> int:
        return self.tokens

    @property
    def capacity(self) -> int:
        return self.tokens

    @property
    def reach(self) -> None:
        return None

    @property
    def shares_values(self) -> bool:
        return True

    @property
    def pages_of_a_stream(self) -> int:
        """That the longest stream takes."""
        return -(-self.tokens // self.page_size)

    def init(self, spec: KVSpec) -> PoolState:
        one = dataclasses.replace(spec, batch_size=self.pages)
        k, v = (jnp.swapaxes(x, 0, 1) for x in (one.buffer(self.page_size), one.values(self.page_size)))
        return PoolState(k, v, spec.counter())

    def update(self, state: PoolState, query: Query, tokens: KVTokens) -> tuple[Float[Array, "B C H D"], PoolState]:
        if query.tables is None:
            raise ValueError("a stream in a pool of pages needs tables that say which pages are its own")
        parts = [self._attend_own(state, query), query.attend_own(tokens, None)]
        if query.tables.shared.size:
            parts.append(self._attend_shared(state, query))
        out = add_sink_logits(merge(*parts), query.sink_logits).out
        valid = tokens.valid if query.answered else ordered_after(tokens.valid, out)
        return out, self._store(state, query.tables, dataclasses.replace(tokens, valid=valid))

    def _attend_own(self, state: PoolState, query: Query) -> Partial:
        """To the pages behind those that a row shares: each row to its own."""
        tables, size = query.tables, self.page_size
        width = tables.own.shape[1]
        named = jnp.sum(tables.own >= 0, axis=1, dtype=jnp.int32)
        held = jnp.minimum(state.filled, named * size)
        together = min(max(_TOGETHER // size, 1), width)
        left = held - tables.begins * size
        assert state.k is not None
        assert state.v is not None
        if kernel_reads_pool(query, state.k):
            place = tables.begins[:, None] + jnp.arange(width, dtype=jnp.int32)
            behind = jnp.take_along_axis(tables.own, jnp.minimum(place, width - 1), axis=1)
            return decode_pool(query, state.k, state.v, behind, jnp.maximum(left, 0))
        query = _counted_from_its_first_token(query, state.filled)

        def block(i: Array, part: Partial) -> Partial:
            place = tables.begins[:, None] + i * together + jnp.arange(together, dtype=jnp.int32)
            page = jnp.take_along_axis(tables.own, jnp.minimum(place, width - 1), axis=1)
            index = (place[:, :, None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(len(page), -1)
            valid = (index < held[:, None]) & (jnp.repeat(place, size, axis=1) < width)
            k, v = _gathered(state.k, page), _gathered(state.v, page)
            return merge(part, query.attend(k, v, index[:, None].astype(jnp.uint32), valid[:, None]))

        steps = (jnp.max(left) + together * size - 1) // (together * size)
        return jax.lax.fori_loop(0, steps, block, query.nothing())

    def _attend_shared(self, state: PoolState, query: Query) -> Partial:
        """To the pages that several rows have: each page is read once, by the queries of all rows together."""
        tables, size = query.tables, self.page_size
        assert state.k is not None
        assert state.v is not None
        if kernel_reads_pool(query, state.k, shared=True):
            return decode_shared(query, state.k, state.v, tables.shared, tables.sharers)
        rows, width, heads, channels = query.q.shape
        together = max(_TOGETHER // size, 1)
        more = -len(tables.shared) % together
        pages, place = jnp.pad(tables.shared, (0, more)), jnp.pad(tables.place, (0, more))
        sharers = jnp.pad(tables.sharers, ((0, more), (0, 0)))

        def as_one_row(x: Array) -> Array:
            return x.reshape(1, rows * width, *x.shape[2:])

        one = dataclasses.replace(
            query,
            q=as_one_row(query.q),
            raw_q=as_one_row(query.raw_q),
            position=as_one_row(_counted_from_its_first_token(query, state.filled).position),
            seen=query.seen[:1],
            valid=None,
            back=None,
        )

        def block(i: Array, part: Partial) -> Partial:
            def take(x: Array) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, i * together, together)

            page = take(pages)[None]
            index = (take(place)[:, None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(1, 1, -1)
            seen = jnp.repeat(jnp.repeat(take(sharers).T, size, axis=1), width, axis=0)  # [B C, slots]
            k, v = _gathered(state.k, page), _gathered(state.v, page)
            return merge(part, one.attend(k, v, index.astype(jnp.uint32), seen[None, None]))

        steps = (jnp.sum(tables.shared >= 0) + together - 1) // together
        part = jax.lax.fori_loop(0, steps, block, one.nothing())
        return Partial(part.out.reshape(rows, width, heads, channels), part.lse.reshape(rows, width, heads))

    def _store(self, state: PoolState, tables: PageTables, tokens: KVTokens) -> PoolState:
        """Behind what each row has, in its own pages; what finds no page is left out."""
        start, count = tokens.run()
        assert state.k is not None
        assert state.v is not None
        size, rows, width = self.page_size, len(start), tokens.k.shape[2]
        order = jnp.arange(width, dtype=jnp.int32) - start[:, None]
        slot = state.filled[:, None] + order
        page = jnp.take_along_axis(tables.own, jnp.clip(slot // size, 0, tables.own.shape[1] - 1), axis=1)
        taken = (order >= 0) & (order < count[:, None]) & (page >= 0) & (slot < self.tokens)
        at = jnp.where(taken, page * size + slot % size, self.pages * size).reshape(1, rows * width)

        def write(pool: Array, chunk: Array) -> Array:
            flat = pool.reshape(1, pool.shape[0], -1, pool.shape[3])
            new = jnp.swapaxes(chunk, 0, 1).reshape(1, pool.shape[0], rows * width, pool.shape[3])
            return put_tokens(flat, new, at).reshape(pool.shape)

        filled = state.filled + jnp.minimum(count, jnp.maximum(self.tokens - state.filled, 0))
        return PoolState(write(state.k, tokens.k), write(state.v, tokens.v), filled)


def _counted_from_its_first_token(query: Query, filled: Int32[Array, " B"]) -> Query:
    """The query at places in its stream, so that token i is at position i: only differences count."""
    offset = query.position - query.position[:, :1] + filled[:, None].astype(jnp.uint32)
    return dataclasses.replace(query, position=offset)


def _gathered(pool: Array | None, page: Int32[Array, "B n"]) -> Float[Array, "B K slots D"]:
    """Pages of each row side by side; any page where the number is none."""
    assert pool is not None
    heads, pages, size, width = pool.shape
    at = jnp.arange(heads, dtype=jnp.int32)[:, None] * pages + jnp.maximum(page, 0)[:, None]
    found = jnp.take(pool.reshape(heads * pages, size, width), at, axis=0, mode="clip")
    return found.reshape(page.shape[0], heads, page.shape[1] * size, width)
