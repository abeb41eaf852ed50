"""`Pages`: keeps much and reads little. Tokens lie in pages; a query reads the few pages that promise most.

The mechanism that InfLLM (2402.04617), Quest (2406.10774), LServe (2502.14866) and HSA (2504.16795) share: a page is a
run of tokens of the stream, an index keeps a summary of its keys, and a query attends to the `top_k` pages of each key
head whose summaries score best. What a page is good for is the index's business; see `indexes.py`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import Partial
from streamjax.field_checks import LATER, Size
from streamjax.kv.codecs.codec import Codec
from streamjax.kv.codecs.slots import CodedSlots, require_rotated
from streamjax.kv.codecs.stores import stores
from streamjax.kv.decode_kernels import decode_pages, kernel_decodes
from streamjax.kv.pages.choice import among_best, best_pages
from streamjax.kv.pages.host_attention import attend_in_host
from streamjax.kv.pages.host_memory import host_buffer, in_host_memory, push_pages, touched_pages, write_pages
from streamjax.kv.pages.indexes import Index, MinMax, Summary
from streamjax.kv.pages.over_devices import read_chosen_slots
from streamjax.kv.pages.selection import (
    Coarse,
    PageTokens,
    Pool,
    at_distance,
    pooled,
    read_pages,
    scored_by_turns,
    scores_of_pages,
)
from streamjax.kv.pages.tree_search import tree_search
from streamjax.kv.pages.union_reading import read_union
from streamjax.kv.query import KVSpec, KVTokens, Query
from streamjax.kv.slots.over_devices import on_several_devices
from streamjax.kv.slots.ring_buffer import read_ring
from streamjax.kv.slots.ring_state import RingState, push, read_slots, write, write_slots
from streamjax.kv.tiers.paged import PagedTier

Placement = Literal["device", "host"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagesState:
    """tokens: a ring of slots, of which page p has `size` from `p * size` on. summary: the index's, one a page."""

    tokens: RingState
    summary: Summary


@dataclasses.dataclass(frozen=True)
class Pages(PagedTier):
    """Keeps up to `capacity` tokens in pages of `size`; a query reads the `top_k` best pages of each key head.

    The oldest page makes room for the newest, token by token; what it loses falls to the next tier. Query heads that
    share a key head share its pages. The page that is being filled can be chosen like any other.

    Args:
      size: tokens a page.
      capacity: tokens in all pages, a multiple of `size`.
      top_k: pages that are read, at most capacity / size + 1, which is all.
      index: what is kept of a page's keys; `MinMax()`, `MinMax(parts=4)`, `Mean()`.
      distance: all stored tokens stand this far behind every query, whatever is between them: pages beyond what the
        model was trained on stay readable (InfLLM, section 3.2). At their true distance where None.
      block: that many queries of a chunk choose pages together. 1 is exact; a prefill reads fewer bytes with more.
      pool: where several queries or heads choose together: "max", what one of them wants most, or "mean".
      shared: all key heads read the same pages.
      read_newest: the page that is being filled is always among those that are read.
      search: "all" scores every page; "tree" finds good pages in the logarithm of their number (`tree.py`).
      codec: how tokens are stored; as they are where None. A page has whole groups of a codec, and none always waits.
      placement: where keys and values lie: in the device's memory or in the "host"'s, from which the pages that are
        read are copied in each time. For one device; a chunk of a stream may not be longer than `capacity` then.
      attend_on: where a single query reads pages in the host's memory: the "device", to which they are copied, or the
        "host", which gives back a partial. "mesh" says that the pages lie on a second mesh, which gives back partials
        to any queries, where `streaming.by_layer.second_mesh` reads the stream; elsewhere it is as "device".
      coarse: the best runs of pages are chosen first, and pages in them; of all pages where None.

    Raises:
      ValueError: sizes that do not fit each other.
    """

    size: Size
    capacity: Size
    top_k: Size
    index: Index = dataclasses.field(default_factory=MinMax)
    block: Size = 1
    distance: Size | None = None
    pool: Pool = "max"
    shared: bool = False
    read_newest: bool = False
    search: Literal["all", "tree"] = "all"
    placement: Placement = "device"
    codec: Codec | None = dataclasses.field(default=None, metadata=LATER)
    coarse: Coarse | None = dataclasses.field(default=None, metadata=LATER)
    attend_on: Literal["device", "host", "mesh"] = dataclasses.field(default="device", metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attend_on == "host" and self.placement == "device":
            raise ValueError('Pages.attend_on "host" is for placement "host": elsewhere there is nothing to read there')
        if self.attend_on == "mesh" and self.placement == "host":
            raise ValueError('Pages.attend_on "mesh" is for placement "device": pages lie on that mesh\'s devices')
        if self.coarse is not None:
            if not self.index.joins or self.search == "tree" or self.read_newest:
                raise ValueError('Pages.coarse is for BlendedBounds(), search="all" and no page that is always read')
            if self.coarse.top_k * self.coarse.pages < self.top_k:
                runs = f"{self.coarse.top_k} runs of {self.coarse.pages} pages"
                raise ValueError(f"Pages.coarse leaves {runs}, and top_k is {self.top_k}")
        if self.search == "tree" and (self.shared or self.read_newest):
            raise ValueError('Pages.search "tree" is for each key head, and has no page that is always read')
        if self.index.reads_keys and (self.search == "tree" or self.placement == "host" or self.codec is not None):
            needs = 'search="all", placement="device" and no codec'
            raise ValueError(f"Pages with {type(self.index).__name__}() reads all keys as they are: it needs {needs}")
        if self.codec is not None:
            require_rotated(self, self.codec)
            if self.codec.waiting or self.size % self.codec.tokens:
                raise ValueError(
                    f"Pages(size={self.size}) holds whole groups of a codec that has no residual, not {self.codec!r}"
                )
            if self.placement == "host":
                raise ValueError('Pages.codec is for placement "device": in the host\'s memory tokens lie as they are')

    def _in_host(self, state: PagesState) -> bool:
        return self.placement == "host" and in_host_memory(state.tokens.k)

    @property
    def pages(self) -> int:
        """Pages in the buffer: one more than are full, so that the oldest and the newest never share one."""
        return self.capacity // self.size + 1

    def init(self, spec: KVSpec) -> PagesState:
        slots = self.pages * self.size
        score = spec.scores(slots) if self.index.needs_scores else None
        if self.placement == "host":
            k, v = (host_buffer(spec, slots) for _ in "kv")
        else:
            k, v = stores(spec.buffer(slots), spec.values(slots), self.codec)
        tokens = RingState(k, v, spec.positions(slots), spec.counter(), spec.counter(), score)
        one = self._cut(spec.buffer(self.size)), self._cut(tokens.held[:, :, : self.size])
        empty = self.index.summarise(*one, None if score is None else self._cut(score[:, :, : self.size]))
        return PagesState(tokens, jax.tree.map(lambda x: jnp.repeat(x, self.pages, axis=2), empty))

    def stores_first(self, state: PagesState, query: Query) -> bool:
        """Whether keys and values are written before a chunk attends, where this is the last tier: `with_written`."""
        return self._read_by_host(state, query) and not self.index.needs_scores

    def with_written(self, state: PagesState, written: PagesState) -> PagesState:
        """`state` with the keys and values of `written`, which a chunk reads as well as its own.

        What a program writes to after the host has read it, it copies first; what it wrote to before, it does not.
        """
        # A slot that was written to held no token before: there is a page more than there is room for tokens.
        ring = dataclasses.replace(state.tokens, k=written.tokens.k, v=written.tokens.v)
        return dataclasses.replace(state, tokens=ring)

    def _read_by_host(self, state: PagesState, query: Query) -> bool:
        """Whether a query goes to where the pages lie."""
        single = query.q.shape[1] == 1 and not query.differentiable
        return self.attend_on == "host" and self._in_host(state) and single

    def store(self, state: PagesState, tokens: KVTokens) -> PagesState:
        tokens = self.placed(tokens)
        if self._in_host(state):
            ring, keys = write_pages(state.tokens, tokens, self.size, self.capacity)
            return self._summarised(state, ring, tokens, keys)
        return self._summarised(state, write(state.tokens, tokens, keep=self.capacity), tokens)

    def insert(self, state: PagesState, tokens: KVTokens) -> tuple[PagesState, KVTokens]:
        tokens, keys = self.placed(tokens), None
        if self._in_host(state):
            ring, keys, evicted = push_pages(state.tokens, tokens, self.size, self.capacity)
        else:
            ring, evicted = push(state.tokens, tokens, keep=self.capacity)
        if self.distance is not None:
            evicted = evicted.moved(back=False)
        return self._summarised(state, ring, tokens, keys), evicted

    def _summarised(
        self, old: PagesState, ring: RingState, tokens: KVTokens, touched: Float[Array, "B K N S D"] | None = None
    ) -> PagesState:
        """The state when `tokens` have been written: pages that took some in, a row of them, are summarised again.

        `touched`: the keys of these pages, where they are at hand.
        """
        _, count = tokens.run()
        start = old.tokens.cursor
        first = start // self.size
        changed = jnp.where(count > 0, (start + count + self.size - 1) // self.size - first, 0)
        most = min(touched_pages(tokens.k.shape[2], self.size), self.pages)
        if touched is None:
            # Fused with the write, this read would make the CPU compiler copy the whole buffer at every token.
            keys, score = jax.lax.optimization_barrier((ring.k, ring.score))
            ring = dataclasses.replace(ring, k=keys, score=score)
            if isinstance(keys, CodedSlots):
                touched = self._cut(keys.decoded_run(first * self.size, most * self.size))
            else:
                touched = self._run_of(keys, first, most)
        score = None if ring.score is None else self._run_of(ring.score, first, most)
        held = read_ring(self._cut(ring.held), first, most, axis=2)
        fresh = self.index.summarise(touched, held, score)
        nothing = jnp.zeros_like(first)
        summary = jax.tree.map(
            lambda stored, new: write_slots(stored, new, first, nothing, jnp.minimum(changed, most)),
            old.summary,
            fresh,
        )
        return PagesState(ring, summary)

    def attend(self, state: PagesState, query: Query, reach: int | None) -> Partial:
        """Attention of the chunk's queries to the pages that they choose.

        Raises:
          ValueError: a tree search in a model with ALiBi, where a page's worth depends on its distance.
        """
        if self.search == "tree" and query.slopes is not None:
            raise ValueError('Pages.search "tree" does not know distances: models with ALiBi need search="all"')
        ring = state.tokens
        pages = PageTokens(*(self._cut(x) for x in (ring.k, ring.v, ring.position, ring.held)))
        query, pages = at_distance(query, pages, self.distance)
        block = min(self.block, query.q.shape[1])
        # Before the buffer has been full its tokens lie from slot 0 on.
        held = jnp.where(ring.filled < self.capacity, -(-ring.filled // self.size), self.pages)

        def read_chosen() -> Partial:
            some = None
            if self.search == "tree":
                chosen, some = self._descend(state, query, block)
            else:
                if block == 1 < query.q.shape[1] and not query.differentiable and self.placement == "device":
                    return read_union(pages, query, partial(self._wanted, state, pages, held=held))
                scores, most = self._scores(state, pages, query, block, held)
                chosen = best_pages(scores, self.top_k, most)
                if self.coarse is not None:
                    some = jnp.take_along_axis(scores, chosen, axis=3) > -jnp.inf
                chosen = jnp.broadcast_to(chosen, (chosen.shape[0], ring.k.shape[1], *chosen.shape[2:]))
            if self.placement == "device" and kernel_decodes(query, pages.k, self.top_k, self.size):
                oldest = (ring.cursor - ring.filled) % ring.k.shape[2]
                return decode_pages(query, pages.k, pages.v, chosen, some, ring.filled, oldest, self.size)
            if query.q.shape[1] == 1 and on_several_devices(ring.k):
                return read_chosen_slots(ring, query, chosen, some, self.size, at_zero=self.distance is not None)
            if self._read_by_host(state, query):
                return attend_in_host(pages, query, chosen[:, :, 0], None if some is None else some[:, :, 0])
            return read_pages(pages, query, chosen, block, some)

        return self.read(pages, query, held, read_chosen)

    def _wanted(
        self, state: PagesState, pages: PageTokens, query: Query, held: Int32[Array, " B"]
    ) -> Bool[Array, "B #K C P"]:
        """Which pages each query reads, for each key head."""
        scores, most = self._scores(state, pages, query, 1, held)
        return among_best(scores, self.top_k, most)

    def _scores(
        self, state: PagesState, pages: PageTokens, query: Query, block: int, held: Int32[Array, " B"]
    ) -> tuple[Float[Array, "B #K n P"], Int32[Array, ""] | None]:
        """How much each block of queries wants each page; after how many pages there is none, where that is known."""
        newest = None
        if self.read_newest:
            cursor = state.tokens.cursor[:, None]
            newest = (jnp.arange(self.pages) == cursor // self.size) & (cursor % self.size > 0)
        summary = (pages.k, pages.valid) if self.index.reads_keys else state.summary
        scores = scores_of_pages(
            pages, summary, query, self.index,
            block=block, pool=self.pool, shared=self.shared, always=newest, held=held, coarse=self.coarse,
            over_devices=query.q.shape[1] == 1 and on_several_devices(state.tokens.k),
        )  # fmt: skip
        return scores, jnp.max(held) if scored_by_turns(self.pages, query) else None

    def _descend(
        self, state: PagesState, query: Query, block: int
    ) -> tuple[Int32[Array, "B K n top_k"], Bool[Array, "B K n top_k"]]:
        """The pages that a tree search finds for each block of queries and key head, and which are pages at all."""
        heads, width = state.tokens.k.shape[1], query.q.shape[1]
        short = -width % block
        q = jax.lax.stop_gradient(rearrange(query.q, "b c (k g) d -> b k c g d", k=heads))
        q = jnp.pad(q, ((0, 0), (0, 0), (0, short), (0, 0), (0, 0)))
        q = rearrange(q, "b k (n c) g d -> n b k (c g) d", c=block)
        asks = jnp.ones((1, width), bool) if query.valid is None else query.valid
        asks = rearrange(jnp.pad(asks, ((0, 0), (0, short))), "b (n c) -> n b 1 c 1 1", c=block)
        summary = jax.lax.stop_gradient(state.summary)

        def score_one(q: Array, asks: Array, pages: Array) -> Array:
            """Scores [B, K, M] of pages [B, K, M] for the queries of one block."""
            some = jax.tree.map(
                lambda x: jnp.take_along_axis(x, pages.reshape(*pages.shape, *[1] * (x.ndim - 3)), axis=2), summary
            )
            found = rearrange(self.index.scores(some, q), "b k (c g) m -> b k c g m", c=block)
            return pooled(pooled(found, asks, 2, self.pool), jnp.ones((1, 1, 1, 1), bool), 2, self.pool)

        def score(pages: Array) -> Array:
            return jnp.moveaxis(jax.vmap(score_one)(q, asks, jnp.moveaxis(pages, 2, 0)), 0, 2)

        held = self._cut(state.tokens.held).any(axis=-1)[:, :, None]
        held = jnp.broadcast_to(held, (held.shape[0], heads, q.shape[0], held.shape[-1]))
        return tree_search(score, held, self.top_k)

    def _run_of(self, x: Array, first: Int32[Array, " B"], count: int) -> Array:
        """So many pages in a row of an array with one entry a slot."""
        return self._cut(read_slots(x, first * self.size, count * self.size))

    def _cut(self, x: Any) -> Any:
        """The pages of an array with one entry a slot; codes lie in them as they are."""
        if isinstance(x, CodedSlots):
            return x
        return rearrange(x, "b k (p s) ... -> b k p s ...", s=self.size)
