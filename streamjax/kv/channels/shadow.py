"""`Shadow`: keys of low rank, of which a query reads the best pages (ShadowKV, Sun et al., 2410.21465)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import Partial, merge
from streamjax.attention.block_cutting import cut_blocks
from streamjax.attention.rotary import Rotary
from streamjax.field_checks import LATER, Count, Fraction, Size
from streamjax.kv.channels.bases import BasisSlots, WholeSlots
from streamjax.kv.channels.host_slots import HostSlots
from streamjax.kv.channels.landmark_shares import landmark_shares
from streamjax.kv.channels.low_rank import LowRank
from streamjax.kv.codecs.slots import at_slots, over_blocks
from streamjax.kv.pages.host_memory import in_host_memory
from streamjax.kv.pages.kth_largest import kth_largest
from streamjax.kv.pages.union_reading import attend_units
from streamjax.kv.query import SLOT_BLOCK, KVSpec, KVTokens, Query, Stored
from streamjax.kv.slots.ring_buffer import put_tokens
from streamjax.kv.tiers.full import LinearState, append
from streamjax.kv.tiers.pages import Placement

CHOOSING = 64  # queries of a chunk that choose at a time


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
    until a group is full is read whole. Which pages a query reads does not depend on its neighbours.

    Args:
      capacity, keys, group, factors: see `LowRank`; a group has whole pages.
      values: 1.
      page: tokens a page.
      top_k: pages that a query reads beside the outliers.
      outliers: pages that keep their keys.
      placement: where values lie, but for those that wait: in the device's memory or in the "host"'s, from which the
        pages that are read are copied in each time. For one device.

    Raises:
      ValueError: sizes that do not fit each other, or values in a basis.
    """

    keys: Fraction = 0.15
    values: Fraction = 1
    page: Size = 8
    top_k: Size = 256
    outliers: Count = 48
    placement: Placement = dataclasses.field(default="device", metadata=LATER)

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
        parts = [whole, self._read_outliers(state, query, coded)]
        if query.q.shape[1] == 1:
            parts.append(self._read_chosen(state, query, self._choose(state, query.q, query.scale, coded)[:, :, 0]))
        else:
            parts.append(self._read_all(state, query, self._chosen(state, query, coded), jnp.max(coded) * self.page))
        return merge(*parts)

    def _choose(
        self, state: ShadowState, q: Float[Array, "B C H D"], scale: float, coded: Int32[Array, " B"]
    ) -> Float[Array, "B K C P"]:
        """How much each query and key head wants each page; -inf where it does not read it, as it does `top_k`."""
        heads = state.landmarks.shape[1]
        q = rearrange(q, "b c (k g) d -> b k g c d", k=heads)
        wants = landmark_shares(q, state.landmarks, self._free(state, coded), scale, jnp.max(coded))
        if self.top_k >= wants.shape[3]:
            return wants
        least = jax.lax.cond(
            jnp.max(coded) > self.top_k,
            lambda wants: kth_largest(wants, self.top_k),
            lambda wants: jnp.full((*wants.shape[:3], 1), -jnp.inf, wants.dtype),
            wants,
        )
        return jnp.where(wants >= least, wants, -jnp.inf)

    def _free(self, state: ShadowState, coded: Int32[Array, " B"]) -> Bool[Array, "B K P"]:
        """The pages among which heads choose: those that no longer wait, and are not held whole."""
        number = jnp.arange(state.landmarks.shape[2], dtype=jnp.int32)
        held = (state.outliers.page[..., None] == number) & jnp.isfinite(state.outliers.likeness)[..., None]
        return (number < coded[:, None])[:, None] & ~held.any(axis=2)

    def _chosen(self, state: ShadowState, query: Query, coded: Int32[Array, " B"]) -> Bool[Array, "B K C P"]:
        """Which pages each query and key head of a chunk reads; nothing is scored while that is all of them."""
        width = query.q.shape[1]

        def every() -> Array:
            free = self._free(state, coded)
            return jnp.broadcast_to(free[:, :, None], (*free.shape[:2], width, free.shape[2]))

        def best() -> Array:
            fixed, q = jax.lax.stop_gradient((state, cut_blocks(query.q, min(CHOOSING, width))))
            wants = jax.lax.map(lambda q: self._choose(fixed, q, query.scale, coded) > -jnp.inf, q)
            return rearrange(wants, "n b k c p -> b k (n c) p")[:, :, :width]

        if self.top_k >= state.landmarks.shape[2]:
            return every()
        chosen: Array = jax.lax.cond(jnp.max(coded) > self.top_k, best, every)
        return chosen

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

    def _read_all(
        self, state: ShadowState, query: Query, mine: Bool[Array, "B K C P"], used: Int32[Array, ""]
    ) -> Partial:
        """Attention of a chunk's queries to the first `used` slots: keys are rebuilt once, a mask says who reads."""
        slots, pages = state.slots, self.group // self.page  # pages of a unit of slots, which is a group

        def block(part: Partial, start: Array, units: int, fresh: Bool[Array, " m"]) -> Partial:
            k, v = (x.part(start, units, 0) for x in (slots.k, slots.v))
            position = slots.k.side(slots.position, start, units, 0)
            reads = jax.lax.dynamic_slice_in_dim(mine, start * pages, units * pages, 3)
            k = k if query.rotary is None else query.rotary.moved(k, position)
            if query.slopes is None and query.back is None:  # what lies here comes before all queries
                fresh = fresh.reshape(1, 1, -1, self.page)
                return merge(
                    part, attend_units(query, k, v, reads, jnp.broadcast_to(fresh, (len(k), *fresh.shape[1:])))
                )
            valid = jnp.repeat(reads, self.page, axis=3)
            return merge(part, query.attend(k, v, position, valid & fresh))

        return over_blocks(slots.k, block, query.nothing(), used, SLOT_BLOCK)


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
