"""`ContentPages`: pages that end where the content does, of different lengths.

Text has joints: sentences end, subjects change. A page that ends there is about one thing, and its summary says more
than that of a page cut by the count. DHSA (2510.24606) and SentenceKV (2504.00970) read such pages; where they end is
the business of a rule, see `boundaries.py`, and what they are good for that of an index, see `indexes.py`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32

from pallas_kernels.partial import Partial
from streamjax.field_checks import Size
from streamjax.kv.pages.boundaries import Boundary
from streamjax.kv.pages.choice import among_best, best_pages
from streamjax.kv.pages.indexes import Index, Mean, Summary
from streamjax.kv.pages.selection import (
    PageTokens,
    Pool,
    at_distance,
    read_pages,
    scored_by_turns,
    scores_of_pages,
)
from streamjax.kv.pages.union_reading import read_held, read_union
from streamjax.kv.query import KVSpec, KVTokens, Query
from streamjax.kv.slots.ring_buffer import put_tokens, read_ring, write_ring
from streamjax.kv.tiers.paged import PagedTier

UNIT = 16  # slots of a page that are read together, at most
SUMMARISED = 32  # pages that are summarised at a time; a chunk seldom touches more


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContentPagesState:
    """A ring of P pages, page p in the slots from `p * size` on, of which its first `count` hold tokens, in order.

    summary: the index's, one a page. marks: of the last tokens that were stored, for the rule. cursor: the page that
    will be opened next; the one before it is open. score: see `KVTokens`; None where the index does not want it.
    """

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S V"]
    position: UInt32[Array, "B 1 S"]
    count: Int32[Array, "B 1 P"]
    summary: Summary
    marks: Shaped[Array, "B #K L ..."]
    cursor: Int32[Array, " B"]
    score: Float[Array, "B H S"] | None = None


@dataclasses.dataclass(frozen=True)
class ContentPages(PagedTier):
    """Keeps tokens in pages of at most `size`, which end where `boundary` says; a query reads the `top_k` best pages.

    The last tier of its cascade: when all pages are taken the oldest goes as a whole. A page that ended early leaves
    its last slots empty, so fewer than `capacity` tokens may be kept. What is stored does not depend on how a stream is
    cut into chunks. Query heads that share a key head share its pages. The open page can be chosen like any other.

    Args:
      size: tokens that a page holds at most.
      capacity: slots in all pages, a multiple of `size`.
      top_k: pages that are read, at most capacity / size, which is all.
      boundary: where pages end; `KeyChange()`, `EndTokens(ids)`.
      index: what is kept of a page's keys; `Mean(power=0.5)` does not favour short pages nor long ones.
      block: that many queries of a chunk choose pages together. 1 is exact; a prefill reads fewer bytes with more.
      distance: all stored tokens stand this far behind every query, see `Pages`. At their true distance where None.
      pool: where several queries or heads choose together: "max", what one of them wants most, or "mean".
      shared: all key heads read the same pages.

    Raises:
      ValueError: sizes that do not fit each other.
    """

    last_because: ClassVar[str] = "a page leaves it as a whole"

    size: Size
    capacity: Size
    top_k: Size
    boundary: Boundary
    index: Index = dataclasses.field(default_factory=lambda: Mean(power=0.5))
    block: Size = 1
    distance: Size | None = None
    pool: Pool = "max"
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.boundary.check(self.size)

    @property
    def needs_ids(self) -> bool:
        return self.boundary.needs_ids

    @property
    def pages(self) -> int:
        return self.capacity // self.size

    def init(self, spec: KVSpec) -> ContentPagesState:
        k, v, position = spec.buffer(self.capacity), spec.buffer(self.capacity), spec.positions(self.capacity)
        score = spec.scores(self.capacity) if self.index.needs_scores else None
        count = jnp.zeros((spec.batch_size, 1, self.pages), jnp.int32)
        summary = self._summarise(k, count, score, spec.counter(), self.pages)
        return ContentPagesState(k, v, position, count, summary, self.boundary.init(spec), spec.counter(), score)

    def store(self, state: ContentPagesState, tokens: KVTokens) -> ContentPagesState:
        place, marks = self._places(state, tokens)
        opens = tokens.valid[:, 0] & (place == 0)
        turn = jnp.cumsum(opens, axis=1, dtype=jnp.int32)  # pages that the chunk has opened up to each token
        opened = turn[:, -1]
        # of a chunk that opens more pages than there are the newest stay
        stays = tokens.valid[:, 0] & (turn > (opened - self.pages)[:, None])
        page = (state.cursor[:, None] - 1 + turn) % self.pages
        slot = jnp.where(stays, page * self.size + place, self.capacity)
        joins = tokens.valid[:, 0] & ~opens
        newest = stays & ~jnp.pad(joins[:, 1:], ((0, 0), (0, 1)))  # the chunk's last token in its page
        count = put_tokens(state.count, (place + 1)[:, None], jnp.where(newest, page, self.pages))

        stored = self.placed(tokens)
        k, v, position = (
            put_tokens(old, new, slot)
            for old, new in ((state.k, stored.k), (state.v, stored.v), (state.position, stored.position))
        )
        score = None if state.score is None or tokens.score is None else put_tokens(state.score, tokens.score, slot)
        # Fused with the write, this read would make the CPU compiler copy the whole buffer at every token.
        k, score = jax.lax.optimization_barrier((k, score))
        _, some = tokens.run()
        first = jnp.min(jnp.where(stays, turn, opened[:, None]), axis=1)
        changed = jnp.where(some > 0, opened - first + 1, 0)
        cursor = state.cursor - 1 + first
        summary = self._summarised(state.summary, (k, count, score), cursor, changed, tokens.k.shape[2])
        cursor = (state.cursor + opened) % self.pages
        return ContentPagesState(k, v, position, count, summary, marks, cursor, score)

    def _places(
        self, state: ContentPagesState, tokens: KVTokens
    ) -> tuple[Int32[Array, "B C"], Shaped[Array, "B #K L ..."]]:
        """The place that each token takes in its page, 0 in a page that it opens, and the marks of the last tokens."""
        start, some = tokens.run()
        look = self.boundary.look_back
        new = self.boundary.marks(tokens).astype(state.marks.dtype)
        line = jnp.concatenate((jnp.zeros_like(state.marks), new), axis=2)
        # what was stored before stands right before the first token that is real
        line = jax.vmap(lambda row, old, at: jax.lax.dynamic_update_slice_in_dim(row, old, at, axis=1))(
            line, state.marks, start
        )
        last = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, look, axis=1))(line, start + some)

        ends = self.boundary.page_ends(line)

        def place(held: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
            """How many tokens the open page holds behind a token."""
            ends, valid = token
            end = jnp.take_along_axis(ends, jnp.clip(held - 1, 0, look - 1)[:, None], axis=1)[:, 0]
            joins = (held > 0) & (held < self.size) & ((held < self.boundary.least) | ~end)
            held = jnp.where(valid, jnp.where(joins, held + 1, 1), held)
            return held, held

        open_page = (state.cursor - 1) % self.pages
        before = jnp.take_along_axis(state.count[:, 0], open_page[:, None], axis=1)[:, 0]
        after = jax.lax.scan(place, before, (jnp.swapaxes(ends, 0, 1), jnp.swapaxes(tokens.valid[:, 0], 0, 1)))[1]
        return jnp.swapaxes(after, 0, 1) - 1, last

    def _summarised(
        self,
        summary: Summary,
        tokens: tuple[Array, Array, Array | None],
        first: Int32[Array, " B"],
        changed: Int32[Array, " B"],
        width: int,
    ) -> Summary:
        """The summaries when `changed` pages from `first` on have taken in some of `width` tokens."""
        summary, tokens = jax.lax.stop_gradient((summary, tokens))
        # the open page and those that a chunk opens, each of which is as long as the rule wants before the next
        most = min(1 + -(-(width - 1) // self.boundary.least), self.pages)
        step = min(most, SUMMARISED)

        def some(turn: Array | int, summary: Summary) -> Summary:
            at = (first + turn * step) % self.pages
            fresh = self._summarise(*tokens, at, step)
            left = jnp.clip(changed - turn * step, 0, step)
            return jax.tree.map(
                lambda old, new: write_ring(old, new, at, jnp.zeros_like(at), left, axis=2), summary, fresh
            )

        if step == most:
            return some(0, summary)
        return jax.lax.fori_loop(0, -(-jnp.max(changed) // step), some, summary)

    def _summarise(self, keys: Array, count: Array, score: Array | None, first: Array, pages: int) -> Summary:
        """The summaries of so many pages in a row."""

        def take_run(x: Array) -> Array:
            return read_ring(self._cut(x), first, pages, axis=2)

        valid = _holds(read_ring(count, first, pages, axis=2), self.size)
        return self.index.summarise(take_run(keys), valid, None if score is None else take_run(score))

    def attend(self, state: ContentPagesState, query: Query, reach: int | None) -> Partial:
        k, v, position = (self._cut(x) for x in (state.k, state.v, state.position))
        pages = PageTokens(k, v, position, _holds(state.count, self.size))
        query, pages = at_distance(query, pages, self.distance)
        block = min(self.block, query.q.shape[1])
        held = jnp.sum(state.count[:, 0] > 0, axis=1, dtype=jnp.int32)

        def read_chosen() -> Partial:
            summary = (pages.k, pages.valid) if self.index.reads_keys else state.summary
            most = jnp.max(held) if scored_by_turns(self.pages, query) else None

            def scores(query: Query, block: int) -> Array:
                return scores_of_pages(
                    pages, summary, query, self.index, block=block, pool=self.pool, shared=self.shared, held=held
                )

            if block == 1 < query.q.shape[1] and not query.differentiable:
                return read_union(pages, query, lambda some: among_best(scores(some, 1), self.top_k, most), self._unit)
            chosen = best_pages(scores(query, block), self.top_k, most)
            chosen = jnp.broadcast_to(chosen, (chosen.shape[0], k.shape[1], *chosen.shape[2:]))
            return read_pages(pages, query, chosen, block)

        return self.read(pages, query, held, read_chosen)

    def read_first(self, pages: PageTokens, query: Query, held: Int32[Array, " B"]) -> Partial:
        return read_held(pages, query, self._unit)

    @property
    def _unit(self) -> int:
        """Slots that are read together: short pages leave most of theirs empty."""
        return next(unit for unit in range(min(UNIT, self.size), 0, -1) if self.size % unit == 0)

    def _cut(self, x: Array) -> Array:
        """The pages of an array with one entry a slot."""
        return rearrange(x, "b k (p s) ... -> b k p s ...", s=self.size)


def _holds(count: Int32[Array, "B 1 P"], size: int) -> Bool[Array, "B 1 P S"]:
    """Which slots of each page hold tokens."""
    return jnp.arange(size) < count[..., None]
