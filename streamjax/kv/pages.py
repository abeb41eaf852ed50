"""`Pages`: keeps much and reads little. Tokens lie in pages; a query reads the few pages that promise most.

The mechanism that InfLLM (2402.04617), Quest (2406.10774), LServe (2502.14866) and HSA (2504.16795) share: a page is a
run of tokens of the stream, an index keeps a summary of its keys, and a query attends to the `top_k` pages of each key
head whose summaries score best. What a page is good for is the index's business; see `indexes.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Int32

from pallas_kernels.partial import Partial
from streamjax.kv.indexes import Index, MinMax, Summary
from streamjax.kv.ring import read_ring, write_ring
from streamjax.kv.tier import KVSpec, KVTokens, Query, Tier
from streamjax.kv.window import RingState, push, write

GATHERED = 2**22  # key values that are gathered at a time for the queries of a chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagesState:
    """tokens: a ring of slots, of which page p has `size` from `p * size` on. summary: the index's, one a page."""

    tokens: RingState
    summary: Summary


@dataclasses.dataclass(frozen=True)
class Pages(Tier):
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

    Raises:
      ValueError: sizes that do not fit each other.
    """

    size: int
    capacity: int
    top_k: int
    index: Index = dataclasses.field(default_factory=MinMax)
    block: int = 1
    distance: int | None = None
    pool: Literal["max", "mean"] = "max"
    shared: bool = False
    read_newest: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "top_k", "block", "distance"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"Pages.{name} must be at least 1, got {getattr(self, name)}")
        if self.capacity < self.size or self.capacity % self.size:
            raise ValueError(f"Pages.capacity must be a multiple of the page size {self.size}, got {self.capacity}")
        if self.top_k > self.pages:
            where = f"{self.capacity} tokens lie in at most {self.pages} pages of {self.size}"
            raise ValueError(f"Pages.top_k is {self.top_k}, but {where}")
        if self.pool not in ("max", "mean"):
            raise ValueError(f'Pages.pool must be "max" or "mean", got {self.pool!r}')
        self.index.check(self.size)

    @property
    def slots(self) -> int:
        return self.capacity

    @property
    def span(self) -> int:
        return self.capacity if self.distance is None else 0

    @property
    def needs_scores(self) -> bool:
        return self.index.needs_scores

    @property
    def pages(self) -> int:
        """Pages in the buffer: one more than are full, so that the oldest and the newest never share one."""
        return self.capacity // self.size + 1

    def init(self, spec: KVSpec) -> PagesState:
        slots = self.pages * self.size
        score = spec.scores(slots) if self.needs_scores else None
        buffers = spec.buffer(slots), spec.buffer(slots), spec.positions(slots)
        tokens = RingState(*buffers, spec.counter(), spec.counter(), score)
        return PagesState(tokens, self._summarise(tokens.k, _holds(tokens), score, spec.counter(), self.pages))

    def store(self, state: PagesState, tokens: KVTokens) -> PagesState:
        tokens = self._placed(tokens)
        return self._summarised(state, write(state.tokens, tokens, keep=self.capacity), tokens)

    def insert(self, state: PagesState, tokens: KVTokens) -> tuple[PagesState, KVTokens]:
        tokens = self._placed(tokens)
        ring, evicted = push(state.tokens, tokens, keep=self.capacity)
        if self.distance is not None:
            evicted = evicted.moved(back=False)
        return self._summarised(state, ring, tokens), evicted

    def _placed(self, tokens: KVTokens) -> KVTokens:
        """Tokens as they are stored: at a fixed distance their keys lie at position 0."""
        return tokens if self.distance is None else tokens.moved(back=True)

    def _summarised(self, old: PagesState, ring: RingState, tokens: KVTokens) -> PagesState:
        """The state when `tokens` have been written: pages that took some in, a row of them, are summarised again."""
        _, count = tokens.run()
        start = old.tokens.cursor
        first = start // self.size
        changed = jnp.where(count > 0, (start % self.size + count + self.size - 1) // self.size, 0)
        most = min((tokens.k.shape[2] + self.size - 2) // self.size + 1, self.pages)
        # Fused with the write, this read would make the CPU compiler copy the whole buffer at every token.
        keys, score = jax.lax.optimization_barrier((ring.k, ring.score))
        fresh = self._summarise(keys, _holds(ring), score, first, most)
        nothing = jnp.zeros_like(first)
        summary = jax.tree.map(
            lambda stored, new: write_ring(stored, new, first, nothing, jnp.minimum(changed, most), axis=2),
            old.summary,
            fresh,
        )
        return PagesState(dataclasses.replace(ring, k=keys, score=score), summary)

    def attend(self, state: PagesState, query: Query, reach: int | None) -> Partial:
        ring, width = state.tokens, query.q.shape[1]
        if self.distance is not None:
            query = query.at(jnp.full_like(query.position, self.distance))
            ring = dataclasses.replace(ring, position=jnp.zeros_like(ring.position))
            state = dataclasses.replace(state, tokens=ring)
        block = min(self.block, width)
        groups = -(-width // block)
        chosen = self._choose(state, query, block)  # [B, K, groups, top_k]
        pages = [self._cut(x) for x in (ring.k, ring.v, ring.position, _holds(ring))]

        def read(query: Query, chosen: Int32[Array, "B K top_k"]) -> Partial:
            def take(x: Array) -> Array:
                # What is one list for all heads is taken for all heads at once.
                index = rearrange(chosen, "b k n -> b 1 (k n)") if x.shape[1] == 1 else chosen
                index = index.reshape(*index.shape, *[1] * (x.ndim - 3))
                found = jnp.take_along_axis(x, index, axis=2, mode="clip")
                return found.reshape(*chosen.shape[:2], -1, *x.shape[4:])

            k, v, position, valid = map(take, pages)
            return query.attend(k, v, position, valid)

        if groups == 1:
            return read(query, chosen[:, :, 0])

        def cut(x: Array) -> Array:
            x = jnp.pad(x, ((0, 0), (0, groups * block - width), *[(0, 0)] * (x.ndim - 2)))
            return rearrange(x, "b (n c) ... -> n b c ...", n=groups)

        names = ("q", "raw_q", "position")
        pieces = {name: cut(getattr(query, name)) for name in names}, rearrange(chosen, "b k n p -> n b k p")
        gathered = chosen.shape[0] * chosen.shape[1] * self.top_k * self.size * ring.k.shape[3]
        parts = jax.lax.map(
            lambda piece: read(dataclasses.replace(query, valid=None, **piece[0]), piece[1]),
            pieces,
            batch_size=max(1, min(GATHERED // gathered, groups)),
        )
        return Partial(*(rearrange(x, "n b c ... -> b (n c) ...")[:, :width] for x in parts))

    def _choose(self, state: PagesState, query: Query, block: int) -> Int32[Array, "B K n top_k"]:
        """The pages that each block of queries reads, best first, for each key head."""
        heads, width = state.tokens.k.shape[1], query.q.shape[1]
        q = jax.lax.stop_gradient(rearrange(query.q, "b c (k g) d -> b k (c g) d", k=heads))
        scores = self.index.scores(jax.lax.stop_gradient(state.summary), q)
        scores = rearrange(scores, "b k (c g) p -> b k g c p", c=width) * query.scale
        held = self._cut(_holds(state.tokens))
        if query.slopes is not None:  # ALiBi: a page is as near as its newest token
            position = self._cut(state.tokens.position)
            ahead = (query.position[:, None, :, None, None] - position[:, :, None]).astype(jnp.int32)
            near = jnp.min(jnp.where(held[:, :, None], ahead, jnp.iinfo(jnp.int32).max), axis=-1)
            slopes = rearrange(query.slopes, "(k g) -> 1 k g 1 1", k=heads)
            scores -= slopes * near[:, :, None].astype(scores.dtype)
        if self.shared:
            scores = rearrange(scores, "b k g c p -> b 1 (k g) c p")
        scores = self._pooled(scores, jnp.ones((1, 1, 1, 1, 1), bool), axis=2)
        asks = jnp.ones((1, width), bool) if query.valid is None else query.valid  # padding must not choose for others
        short = -width % block
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, short), (0, 0)))
        asks = rearrange(jnp.pad(asks, ((0, 0), (0, short))), "b (n c) -> b 1 n c 1", c=block)
        scores = self._pooled(rearrange(scores, "b k (n c) p -> b k n c p", c=block), asks, axis=3)
        scores = jnp.where(held.any(axis=-1)[:, :, None], scores, -jnp.inf)
        if self.read_newest:
            cursor = state.tokens.cursor[:, None]
            newest = (jnp.arange(self.pages) == cursor // self.size) & (cursor % self.size > 0)
            scores = jnp.where(newest[:, None, None], jnp.inf, scores)
        chosen = jax.lax.top_k(scores, self.top_k)[1].astype(jnp.int32)
        return jnp.broadcast_to(chosen, (chosen.shape[0], heads, *chosen.shape[2:]))

    def _pooled(self, scores: Array, asks: Bool[Array, "..."], axis: int) -> Array:
        """One score of those along `axis` that choose together and `ask`."""
        if self.pool == "max":
            return jnp.max(jnp.where(asks, scores, -jnp.inf), axis=axis)
        asks = jnp.broadcast_to(asks, scores.shape)
        return jnp.sum(jnp.where(asks, scores, 0), axis=axis) / jnp.maximum(jnp.sum(asks, axis=axis), 1)

    def _summarise(self, keys: Array, holds: Array, score: Array | None, first: Array, count: int) -> Summary:
        """The summaries of `count` pages in a row."""

        def pages(x: Array) -> Array:
            return read_ring(self._cut(x), first, count, axis=2)

        return self.index.summarise(pages(keys), pages(holds), None if score is None else pages(score))

    def _cut(self, x: Array) -> Array:
        """The pages of an array with one entry a slot."""
        return rearrange(x, "b k (p s) ... -> b k p s ...", s=self.size)


def _holds(ring: RingState) -> Bool[Array, "B 1 S"]:
    """Which slots hold tokens."""
    slots = ring.k.shape[2]
    oldest = (ring.cursor - ring.filled) % slots
    return ((jnp.arange(slots) - oldest[:, None]) % slots < ring.filled[:, None])[:, None]
