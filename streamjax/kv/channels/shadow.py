"""`Shadow`: keys of low rank, of which a query reads the best pages (ShadowKV, Sun et al., 2410.21465)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels.partial import Partial, merge
from streamjax.attention.block_cutting import cut_blocks
from streamjax.attention.rotary import Rotary
from streamjax.barriers import materialized_once
from streamjax.field_checks import LATER, Count, Fraction, Size
from streamjax.kv.channels.bases import BasisSlots, WholeSlots
from streamjax.kv.channels.host_slots import HostSlots
from streamjax.kv.channels.landmark_shares import landmark_shares
from streamjax.kv.channels.low_rank import LowRank
from streamjax.kv.codecs.slots import at_slots, over_blocks
from streamjax.kv.pages.choice import among_best
from streamjax.kv.pages.host_memory import in_host_memory
from streamjax.kv.pages.selection import PageTokens, gather_pages, pooled
from streamjax.kv.pages.union_reading import QUERIES, read_by_neighbours, read_union_of_neighbours
from streamjax.kv.query import SLOT_BLOCK, KVSpec, KVTokens, Query, Stored
from streamjax.kv.slots.ring_buffer import put_tokens
from streamjax.kv.tiers.full import LinearState, append
from streamjax.kv.tiers.pages import Placement

CHOOSING = 64  # queries of a chunk that choose at a time
REBUILT = 4096  # slots whose keys a chunk rebuilds at a time, where it reads some of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outliers:
    """Pages whose keys are least like their landmark. page: their numbers. likeness: of the least like key; infinite
    where there is no page. k: their keys, rotated, as they were."""

    page: Int32[Array, "B K O"]
    likeness: Float[Array, "B K O"]
    k: Float[Array, "B K O s D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShadowState:
    """landmarks: the mean key of each full page, rotated."""

    slots: LinearState
    landmarks: Float[Array, "B K P D"]
    outliers: Outliers


@dataclasses.dataclass(frozen=True)
class Shadow(LowRank):
    """`LowRank` in pages of `page` tokens, of which a query reads some: keys in a basis, values as they are.

    A page's landmark is its mean key. Each query and key head reads the `top_k` pages that fit best: those with the
    largest weight among all landmarks for one of the query heads that share the key head. `outliers` pages of each key
    head are always read, with keys as they were: those with a key whose cosine to the landmark is least. What waits
    until a group is full is read whole. Of a chunk, `block` neighbouring queries choose together, the pages that one of
    them wants most; with `block=1` which pages a query reads does not depend on its neighbours.

    Args:
      capacity, keys, group, factors: see `LowRank`; a group has whole pages.
      values: 1.
      page: tokens a page.
      top_k: pages that a query reads beside the outliers.
      outliers: pages that keep their keys.
      placement: where values lie, but for those that wait: in the device's memory or in the "host"'s, from which the
        pages that are read are copied in each time. For one device.
      block: that many queries of a chunk choose together. A prefill reads fewer bytes with more.

    Raises:
      ValueError: sizes that do not fit each other, or values in a basis.
    """

    keys: Fraction = 0.15
    values: Fraction = 1
    page: Size = 8
    top_k: Size = 256
    outliers: Count = 48
    placement: Placement = dataclasses.field(default="device", metadata=LATER)
    block: Size = dataclasses.field(default=1, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values != 1:
            raise ValueError(f"Shadow.values is {self.values}: it must be 1, values stay as they are")
        if self.group % self.page or self.group < 2 * self.page:
            raise ValueError(f"Shadow.group must be several pages of {self.page}, got {self.group}")
        if self.factors is not None:
            raise ValueError("Shadow.factors: streams make their own bases, give none")

    def init(self, spec: KVSpec) -> ShadowState:  # type: ignore[override]
        slots = super().init(spec)
        if self.placement == "host":
            slots = dataclasses.replace(slots, v=HostSlots.allocate(spec, slots.v.codec, self.capacity, self.page))
        shape = spec.batch_size, spec.kv_heads, self.outliers
        outliers = Outliers(
            jnp.zeros(shape, jnp.int32),
            jnp.full(shape, jnp.inf, jnp.float32),
            spec.buffer(self.outliers * self.page).reshape(*shape, self.page, spec.head_dim),
        )
        return ShadowState(slots, spec.buffer(slots.k.shape[2] // self.page), outliers)

    def fitted(self, state: ShadowState, tokens: KVTokens) -> ShadowState:  # type: ignore[override]
        return dataclasses.replace(state, slots=super().fitted(state.slots, tokens))

    def stored(self, state: ShadowState, rotary: Rotary | None) -> Stored:  # type: ignore[override]
        return super().stored(state.slots, rotary)

    def insert(self, state: ShadowState, tokens: KVTokens) -> tuple[ShadowState, KVTokens]:  # type: ignore[override]
        most, width = self.group - self.page + 1, tokens.k.shape[2]
        left = tokens.valid
        for start in range(0, width, most):  # what fills a page is still among the keys that wait, or just did
            stop = min(start + most, width)
            cut = {name: getattr(tokens, name)[:, :, start:stop] for name in ("k", "v", "raw_k", "position", "valid")}
            state, rest = self._insert(state, dataclasses.replace(tokens, score=None, ids=None, **cut))
            left = left.at[:, :, start:stop].set(rest.valid)
        return state, dataclasses.replace(tokens, valid=left)

    def _insert(self, state: ShadowState, tokens: KVTokens) -> tuple[ShadowState, KVTokens]:
        before = state.slots.filled
        slots, rest = append(state.slots, tokens.moved(back=True))
        first, pages = before // self.page, (tokens.k.shape[2] + self.page - 1) // self.page
        number = first[:, None] + jnp.arange(pages, dtype=jnp.int32)
        full = number < (slots.filled // self.page)[:, None]

        def note(landmarks: Array, outliers: Outliers) -> tuple[Array, Outliers]:
            token = first[:, None] * self.page + jnp.arange(pages * self.page, dtype=jnp.int32)
            place = token % slots.k.tail.shape[2]
            k = jnp.take_along_axis(slots.k.tail, place[:, None, :, None], axis=2)
            if tokens.rotary is not None:
                k = tokens.rotary.moved(k, at_slots(slots.position, jnp.minimum(token, slots.k.shape[2] - 1)))
            k = rearrange(k, "b k (p s) d -> b k p s d", s=self.page)
            wide = k.astype(jnp.float32)
            mean = jnp.mean(wide, axis=3)
            at = jnp.where(full, number, landmarks.shape[2])[:, None]
            return put_tokens(landmarks, mean, at), _least_like(outliers, k, wide, mean, number, full)

        landmarks, outliers = jax.lax.cond(full.any(), note, lambda *same: same, state.landmarks, state.outliers)
        return ShadowState(slots, landmarks, outliers), rest

    def attend(self, state: ShadowState, query: Query, reach: int | None) -> Partial:  # type: ignore[override]
        slots, rotary = state.slots, query.rotary
        k, v = slots.k, slots.v
        waits = k.waiting()
        assert waits is not None
        keys, places, there = waits
        position, valid = at_slots(slots.position, places), there[:, None]
        keys = keys if rotary is None else rotary.moved(keys, position)
        whole = query.attend(keys, v.tail, position, valid, before=True)
        coded = (slots.filled - k.count) // self.page  # pages that no longer wait
        if query.q.shape[1] > 1:
            return merge(whole, self._read_together(state, query, coded))
        wants = self._choose(state, query.q, query.scale, coded)[:, :, 0]
        return merge(whole, self._read_outliers(state, query, coded), self._read_chosen(state, query, wants))

    def _choose(
        self, state: ShadowState, q: Float[Array, "B C H D"], scale: float, coded: Int32[Array, " B"]
    ) -> Float[Array, "B K C P"]:
        """How much each query and key head wants each page; -inf where it cannot have it."""
        q = rearrange(q, "b c (k g) d -> b k g c d", k=state.landmarks.shape[1])
        free = self._number(state, coded) & ~self._whole(state)
        return landmark_shares(q, state.landmarks, free, scale, jnp.max(coded))

    def _number(self, state: ShadowState, coded: Int32[Array, " B"]) -> Bool[Array, "B 1 P"]:
        """The pages that no longer wait."""
        return (jnp.arange(state.landmarks.shape[2], dtype=jnp.int32) < coded[:, None])[:, None]

    def _whole(self, state: ShadowState) -> Bool[Array, "B K P"]:
        """The pages of each key head whose keys are held as they were."""
        number = jnp.arange(state.landmarks.shape[2], dtype=jnp.int32)
        held = (state.outliers.page[..., None] == number) & jnp.isfinite(state.outliers.likeness)[..., None]
        return held.any(axis=2)

    def _read_outliers(self, state: ShadowState, query: Query, coded: Int32[Array, " B"]) -> Partial:
        outliers, slots = state.outliers, state.slots
        if not self.outliers:
            return query.nothing()
        token = _tokens_of(outliers.page, self.page)
        there = jnp.isfinite(outliers.likeness) & (outliers.page < coded[:, None, None])
        k = rearrange(outliers.k, "b k o s d -> b k (o s) d")
        v = _values(slots.v, outliers.page, token)
        position = jnp.take_along_axis(
            jnp.broadcast_to(slots.position, (*k.shape[:2], slots.k.shape[2])), token, axis=2
        )
        return query.attend(k, v, position, jnp.repeat(there, self.page, axis=2), before=True)

    def _read_chosen(self, state: ShadowState, query: Query, wants: Float[Array, "B K P"]) -> Partial:
        """Attention of single queries: keys of the pages that they chose are rebuilt, and no others."""
        slots = state.slots
        count = min(self.top_k, wants.shape[2])
        best, page = jax.lax.top_k(wants, count)
        token = _tokens_of(page.astype(jnp.int32), self.page)
        heads = token.shape[1]
        # every head reads the coordinates of all heads at the tokens of its own pages
        flat = jnp.broadcast_to(rearrange(token, "b h n -> b 1 (h n)"), (token.shape[0], heads, heads * token.shape[2]))
        codes = jnp.take_along_axis(slots.k.codes, flat[..., None], axis=2)
        codes = rearrange(codes, "b k (h n) c -> b h n (k c)", h=heads)
        assert isinstance(slots.k, BasisSlots)
        assert slots.k.basis is not None
        exact = "highest" if codes.dtype == jnp.float32 else None
        k = jnp.einsum("bhnr,bhdr->bhnd", codes, slots.k.basis, precision=exact).astype(codes.dtype)
        position = jnp.take_along_axis(
            jnp.broadcast_to(slots.position, (*k.shape[:2], slots.k.shape[2])), token, axis=2
        )
        k = k if query.rotary is None else query.rotary.moved(k, position)
        v = _values(slots.v, page.astype(jnp.int32), token)
        return query.attend(k, v, position, jnp.repeat(best > -jnp.inf, self.page, axis=2))

    def _read_together(self, state: ShadowState, query: Query, coded: Int32[Array, " B"]) -> Partial:
        """Attention of a chunk's queries to what no longer waits: keys are rebuilt once for all of them.

        While no row has more pages than a query reads, they are read as they lie: nothing is scored or gathered then.
        """

        def every() -> Partial:
            return self._read_all(state, query, coded)

        def best() -> Partial:
            return self._read_union(state, query, self._wanted(state, query, coded), coded)

        if self.top_k >= state.landmarks.shape[2]:
            return every()
        if isinstance(state.slots.v, HostSlots) and in_host_memory(state.slots.v.codes):
            return best()  # a branch would copy what lies there
        return jax.lax.cond(jnp.max(coded) > self.top_k, best, every)

    def _wanted(self, state: ShadowState, query: Query, coded: Int32[Array, " B"]) -> Bool[Array, "B C K P"]:
        """Which pages each query of a chunk and key head reads, outliers among them."""
        width, block, held = query.q.shape[1], min(self.block, query.q.shape[1]), jnp.max(coded)
        asks = jnp.ones(query.q.shape[:2], bool) if query.valid is None else query.valid
        together = block * max(1, CHOOSING // block)
        fixed, q = jax.lax.stop_gradient((state, cut_blocks(query.q, together)))

        def choose(piece: tuple[Array, Array]) -> Bool[Array, "B K C P"]:
            wants = self._choose(fixed, piece[0], query.scale, coded)
            if block > 1:
                wants = rearrange(wants, "b k (n c) p -> b k n c p", c=block)
                wants = pooled(wants, rearrange(piece[1], "b (n c) -> b 1 n c 1", c=block), 3, "max")
            return jnp.repeat(among_best(wants, self.top_k, held), block, axis=2)

        found = jax.lax.map(choose, (q, cut_blocks(asks, together)))
        whole = self._whole(state) & self._number(state, coded)
        return rearrange(found, "n b k c p -> b (n c) k p")[:, :width] | whole[:, None]

    def _read_all(self, state: ShadowState, query: Query, coded: Int32[Array, " B"]) -> Partial:
        """Attention of all queries to all pages that no longer wait."""
        slots = state.slots

        def block(part: Partial, start: Array, units: int, fresh: Bool[Array, " m"]) -> Partial:
            k, v, position = self._rebuilt(state, query, start, units)
            slot = start * self.group + jnp.arange(k.shape[2], dtype=jnp.int32)
            there = fresh & (slot < coded[:, None] * self.page)
            return merge(part, query.attend(k, v, position, there[:, None], before=True))

        return over_blocks(slots.k, block, query.nothing(), jnp.max(coded) * self.page, SLOT_BLOCK)

    def _read_union(
        self, state: ShadowState, query: Query, wants: Bool[Array, "B C K P"], coded: Int32[Array, " B"]
    ) -> Partial:
        """Attention of each query to the pages that it wants: neighbours gather what any of them does."""
        slots, pages = state.slots, self.group // self.page  # pages of a unit of slots, which is a group
        together = QUERIES if self.block == 1 else self.block

        def block(part: Partial, start: Array, units: int, fresh: Bool[Array, " m"]) -> Partial:
            rebuilt = self._rebuilt(state, query, start, units)
            k, v, position = (rearrange(x, "b k (p s) ... -> b k p s ...", s=self.page) for x in rebuilt)
            there = PageTokens(k, v, position, jnp.ones(position.shape, bool))
            mine = jax.lax.dynamic_slice_in_dim(wants, start * pages, units * pages, 3) & fresh[:: self.page]

            def read(query: Query, mine: Array) -> Partial:
                mine = jnp.swapaxes(mine, 1, 2)
                return read_union_of_neighbours(
                    lambda page: gather_pages(there, page), query, mine, k.shape[1], self.page
                )

            return merge(part, read_by_neighbours(query, read, mine, together=together))

        return over_blocks(slots.k, block, query.nothing(), jnp.max(coded) * self.page, REBUILT)

    def _rebuilt(
        self, state: ShadowState, query: Query, start: Array, units: int
    ) -> tuple[Float[Array, "B K m D"], Float[Array, "B K m V"], UInt32[Array, "B 1 m"]]:
        """Keys, values and positions of some units of slots; outliers have their keys as they were."""
        slots = state.slots
        k, v = (x.part(start, units, 0) for x in (slots.k, slots.v))
        position = slots.k.side(slots.position, start, units, 0)
        k = k if query.rotary is None else query.rotary.moved(k, position)
        if self.outliers:
            pages = rearrange(k, "b k (p s) d -> b k p s d", s=self.page)
            at = state.outliers.page - start * (self.group // self.page)
            here = jnp.isfinite(state.outliers.likeness) & (at >= 0)
            pages = put_tokens(pages, state.outliers.k, jnp.where(here, at, pages.shape[2]))
            k = rearrange(pages, "b k p s d -> b k (p s) d")
        return materialized_once(k, query.seen), v, position


def _values(v: WholeSlots, pages: Int32[Array, "B K n"], tokens: Int32[Array, "B K m"]) -> Float[Array, "B K m V"]:
    """The values of these pages, which are these tokens, on the device."""
    if isinstance(v, HostSlots) and in_host_memory(v.codes):
        return v.fetched_pages(pages)
    return jnp.take_along_axis(v.codes, tokens[..., None], axis=2)


def _tokens_of(pages: Int32[Array, "B K n"], size: int) -> Int32[Array, "B K m"]:
    """The slots of these pages in a row."""
    token = pages[..., None] * size + jnp.arange(size, dtype=jnp.int32)
    return token.reshape(*pages.shape[:2], -1)


def _least_like(
    held: Outliers,
    k: Float[Array, "B K p s D"],
    wide: Float[Array, "B K p s D"],
    mean: Float[Array, "B K p D"],
    number: Int32[Array, "B p"],
    full: Bool[Array, "B p"],
) -> Outliers:
    """Of pages that are held and new ones those with a key that is least like its landmark."""
    count = held.page.shape[2]
    if not count:
        return held
    lengths = jnp.linalg.norm(wide, axis=4) * jnp.linalg.norm(mean, axis=3)[..., None]
    cosine = jnp.einsum("bkpsd,bkpd->bkps", wide, mean, precision="highest") / jnp.maximum(lengths, 1e-30)
    likeness = jnp.where(full[:, None], jnp.min(cosine, axis=3), jnp.inf)
    likeness = jnp.concatenate((held.likeness, likeness), axis=2)
    page = jnp.concatenate((held.page, jnp.broadcast_to(number[:, None], (*k.shape[:2], number.shape[1]))), axis=2)
    order = jnp.argsort(likeness, axis=2, stable=True)[:, :, :count]
    keys = jnp.concatenate((held.k, k.astype(held.k.dtype)), axis=2)
    return Outliers(
        jnp.take_along_axis(page, order, axis=2),
        jnp.take_along_axis(likeness, order, axis=2),
        jnp.take_along_axis(keys, order[..., None, None], axis=2),
    )
