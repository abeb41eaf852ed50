"""Choosing pages by their summaries, and reading them: what all tiers that lie in pages share."""

from __future__ import annotations

import dataclasses
from functools import reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32

from pallas_kernels.partial import Partial, accumulator, merge
from streamjax.attention.block_cutting import cut_blocks, even_batch, join_blocks
from streamjax.field_checks import Size, check_fields
from streamjax.kv.codecs.slots import CodedSlots, Slots, at_slots
from streamjax.kv.pages.choice import among_best
from streamjax.kv.pages.host_memory import in_host_memory, take_pages
from streamjax.kv.pages.indexes import Index, Summary
from streamjax.kv.pages.over_devices import shared_scores
from streamjax.kv.pages.page_scores import score_pages
from streamjax.kv.query import Query

GATHERED = 2**22  # key values that are gathered at a time for the queries of a chunk
SCORED = 256  # pages that the queries of a chunk score at a time, and those only that hold tokens
SCORED_KEYS = 256  # keys, where an index reads them: their products are few enough to stay in a processor's cache
Pool = Literal["max", "mean"]


class PageTokens(NamedTuple):
    """P pages of S slots; `valid` says which of them hold tokens."""

    k: Slots
    v: Slots
    position: UInt32[Array, "B 1 P S"]
    valid: Bool[Array, "B 1 P S"]


def at_distance(query: Query, pages: PageTokens, distance: int | None) -> tuple[Query, PageTokens]:
    """Queries and pages, all tokens that far behind every query; their keys lie at position 0. As they are if None."""
    if distance is None:
        return query, pages
    query = query.at_position(jnp.full_like(query.position, distance))
    return query, pages._replace(position=jnp.zeros_like(pages.position))


def pooled(scores: Array, asks: Bool[Array, "..."], axis: int, pool: Pool) -> Array:
    """One score of those along `axis` that choose together and `ask`: what one of them wants most, or their mean."""
    if pool == "max":
        return jnp.max(jnp.where(asks, scores, -jnp.inf), axis=axis)
    asks = jnp.broadcast_to(asks, scores.shape)
    return jnp.sum(jnp.where(asks, scores, 0), axis=axis) / jnp.maximum(jnp.sum(asks, axis=axis), 1)


@dataclasses.dataclass(frozen=True)
class Coarse:
    """A choice in two levels: pages compete only in the `top_k` best runs of `pages` neighbours (MPCache, 2501.06807).

    Raises:
      ValueError: a number below 1.
    """

    top_k: Size
    pages: Size = 2

    def __post_init__(self) -> None:
        check_fields(self)


def scores_of_pages(
    pages: PageTokens,
    summary: Summary,
    query: Query,
    index: Index,
    *,
    block: int = 1,
    pool: Pool = "max",
    shared: bool = False,
    always: Bool[Array, "B P"] | None = None,
    held: Int32[Array, " B"] | None = None,
    coarse: Coarse | None = None,
    over_devices: bool = False,
) -> Float[Array, "B #K n P"]:
    """How much each block of queries wants each page, for each key head; -inf where a page cannot be read.

    Args:
      pages: the tokens; pages without any come last.
      summary: what `index` keeps of each page.
      query: queries of a chunk.
      index: scores the pages.
      block: that many queries choose together, n blocks in all.
      pool: how several queries or heads agree, see `pooled`.
      shared: one choice for all key heads.
      always: pages that come before all others.
      held: pages of each row that hold tokens, the first ones, where that is known: a chunk scores no others.
      coarse: pages elsewhere than in the best runs have a score of -inf.
      over_devices: the slots lie over the mesh axis `context`, each of whose devices scores its share of the pages.
    """
    heads, total = pages.k.shape[1], pages.position.shape[2]
    if over_devices and query.slopes is None and not (shared or index.reads_keys):

        def score(summary: Summary, some: Array, mine: Query) -> Array:
            own_heads = heads * mine.q.shape[2] // query.q.shape[2]
            nowhere = jnp.zeros((*some.shape, 1), jnp.uint32)  # positions are for slopes
            return _scores(own_heads, summary, nowhere, some[..., None], mine, index, block, pool, shared)

        scores = shared_scores(score, summary, pages.valid.any(axis=3), query)
    elif held is None or not scored_by_turns(total, query):
        scores = _scores(heads, summary, pages.position, pages.valid, query, index, block, pool, shared)
    else:
        together = max(1, min(SCORED_KEYS // pages.position.shape[3], SCORED)) if index.reads_keys else SCORED

        def some(turn: Array, scores: Array) -> Array:
            start = jnp.minimum(turn * together, total - together)  # the last ones are moved back to fit

            def take(x: Array) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, start, together, 2)

            mine = jax.tree.map(take, summary), take(pages.position), take(pages.valid)
            found = _scores(heads, *mine, query, index, block, pool, shared)
            return jax.lax.dynamic_update_slice_in_dim(scores, found.astype(scores.dtype), start, 3)

        groups = -(-query.q.shape[1] // block)
        shape = (query.q.shape[0], 1 if shared else heads, groups, total)
        nothing = jnp.full(shape, -jnp.inf, accumulator(query.q.dtype))
        most = jnp.max(held)
        scores = jax.lax.fori_loop(0, (most + together - 1) // together, some, nothing)
    if coarse is not None:
        scores = jnp.where(
            _in_good_runs(heads, summary, pages, query, index, block, pool, shared, coarse), scores, -jnp.inf
        )
    if always is not None:
        scores = jnp.where(always[:, None, None], jnp.inf, scores)
    return scores


def scored_by_turns(pages: int, query: Query) -> bool:
    """Whether so many pages are scored some at a time, and those without tokens not at all."""
    return pages > SCORED and query.q.shape[1] > 1 and not query.differentiable


def _in_good_runs(
    heads: int,
    summary: Summary,
    pages: PageTokens,
    query: Query,
    index: Index,
    block: int,
    pool: Pool,
    shared: bool,
    coarse: Coarse,
) -> Bool[Array, "B #K n P"]:
    """Which pages lie in the best runs for each block of queries."""
    total, size = pages.position.shape[2], coarse.pages

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, -total % size if i == 2 else 0) for i in range(x.ndim)])

    runs = index.joined(jax.tree.map(padded, summary), padded(pages.valid.any(axis=3)), size)
    position, valid = (rearrange(padded(x), "b k (p n) s -> b k p (n s)", n=size) for x in pages[2:])
    scores = _scores(heads, runs, position, valid, query, index, block, pool, shared)
    good = among_best(scores, min(coarse.top_k, scores.shape[3]))
    return jnp.repeat(good, size, axis=3)[..., :total]


def _scores(
    heads: int,
    summary: Summary,
    position: UInt32[Array, "B 1 P S"],
    valid: Bool[Array, "B 1 P S"],
    query: Query,
    index: Index,
    block: int,
    pool: Pool,
    shared: bool,
) -> Float[Array, "B #K n P"]:
    """How much each block of queries wants each page; -inf where a page holds nothing."""
    width = query.q.shape[1]
    q = jax.lax.stop_gradient(rearrange(query.q, "b c (k g) d -> b k (c g) d", k=heads))
    scores = score_pages(index, jax.lax.stop_gradient(summary), query, q)
    scores = rearrange(scores, "b k (c g) p -> b k g c p", c=width) * query.scale
    if query.slopes is not None:  # ALiBi: a page is as near as its newest token
        ahead = (query.position[:, None, :, None, None] - position[:, :, None]).astype(jnp.int32)
        near = jnp.min(jnp.where(valid[:, :, None], ahead, jnp.iinfo(jnp.int32).max), axis=-1)
        slopes = rearrange(query.slopes, "(k g) -> 1 k g 1 1", k=heads)
        scores -= slopes * near[:, :, None].astype(scores.dtype)
    if shared:
        scores = rearrange(scores, "b k g c p -> b 1 (k g) c p")
    # Head by head: a reduction over so few takes the CPU compiler longer than the product that made them.
    scores = reduce(jnp.maximum if pool == "max" else jnp.add, (scores[:, :, i] for i in range(scores.shape[2])))
    if pool == "mean":
        scores = scores / (query.q.shape[2] if shared else query.q.shape[2] // heads)
    asks = jnp.ones((1, width), bool) if query.valid is None else query.valid  # padding must not choose for others
    short = -width % block
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, short), (0, 0)))
    asks = rearrange(jnp.pad(asks, ((0, 0), (0, short))), "b (n c) -> b 1 n c 1", c=block)
    scores = pooled(rearrange(scores, "b k (n c) p -> b k n c p", c=block), asks, 3, pool)
    return jnp.where(valid.any(axis=-1)[:, :, None], scores, -jnp.inf)


def read_first_pages(pages: PageTokens, query: Query, held: Int32[Array, " B"]) -> Partial:
    """Attention of all queries to all tokens of the first `held` pages of each row."""
    k, v, position, valid = map(_in_a_row, pages)
    return query.attend(k, v, position, valid, filled=held * pages.position.shape[3], before=True)


def _in_a_row(x: Any) -> Any:
    """The slots of all pages; codes lie like that."""
    return x if isinstance(x, CodedSlots) else rearrange(x, "b k p s ... -> b k (p s) ...")


class Waiting(NamedTuple):
    """Tokens that are not coded yet, and the pages in which they will lie."""

    k: Float[Array, "B K T D"]
    v: Float[Array, "B K T V"]
    position: UInt32[Array, "B 1 T"]
    valid: Bool[Array, "B 1 T"]
    page: Int32[Array, "B T"]

    def read(self, query: Query, mine: Bool[Array, "B #K *#C T"]) -> Partial:
        """Attention of queries to those of them that are theirs."""
        valid = self.valid if mine.ndim == 3 else self.valid[:, :, None]
        return query.attend(self.k, self.v, self.position, valid & mine)


def parted(pages: PageTokens) -> tuple[PageTokens, Waiting | None]:
    """Pages with what lies in them, and what waits to be coded; None where nothing ever does."""
    keys, values = (x.waiting() if isinstance(x, CodedSlots) else None for x in (pages.k, pages.v))
    if keys is None or values is None:
        return pages, None
    (k, slots, there), v = keys, values[0]
    position, valid = (at_slots(_in_a_row(x), slots) for x in (pages.position, pages.valid))
    settled = pages.k.settled_only(_in_a_row(pages.valid)).reshape(pages.valid.shape)
    waiting = Waiting(k, v, position, valid & there[:, None], slots // pages.position.shape[3])
    return pages._replace(valid=settled), waiting


def gather_pages(pages: PageTokens, chosen: Int32[Array, "B K N"]) -> tuple[Slots, Slots, Array, Array]:
    """The slots of N pages of each key head in a row: keys, values, positions, and which of them hold tokens."""

    def take(x: Any) -> Any:
        if isinstance(x, CodedSlots):
            return x.gathered(chosen, pages.position.shape[3])
        if in_host_memory(x):
            return rearrange(take_pages(x, chosen), "b k n s d -> b k (n s) d")
        return take_chosen(x, chosen)

    return take(pages.k), take(pages.v), take(pages.position), take(pages.valid)


def take_chosen(x: Shaped[Array, "B #K P S *D"], chosen: Int32[Array, "B K N"]) -> Shaped[Array, "B K M *D"]:
    """The slots of N pages of each key head in a row; what is one list for all heads is taken for all at once."""
    index = rearrange(chosen, "b k n -> b 1 (k n)") if x.shape[1] == 1 else chosen
    index = index.reshape(*index.shape, *[1] * (x.ndim - 3))
    found = jnp.take_along_axis(x, index, axis=2, mode="clip")
    return found.reshape(*chosen.shape[:2], -1, *x.shape[4:])


def read_pages(
    pages: PageTokens,
    query: Query,
    chosen: Int32[Array, "B K n top_k"],
    block: int,
    some: Bool[Array, "B K n top_k"] | None = None,
) -> Partial:
    """Attention of each block of queries to the pages chosen for it; `some` says which of them are pages at all."""
    width, groups, size = query.q.shape[1], chosen.shape[2], pages.position.shape[3]
    settled, waiting = parted(pages)
    in_host = not isinstance(pages.k, CodedSlots) and in_host_memory(pages.k)

    def read(query: Query, chosen: Int32[Array, "B K top_k"], some: Bool[Array, "B K top_k"] | None) -> Partial:
        k, v, position, valid = gather_pages(settled, chosen)
        if some is not None:
            valid &= jnp.repeat(some, size, axis=2)
        part = query.attend(k, v, position, valid, before=query.q.shape[1] > 1)
        if waiting is None:
            return part
        mine = chosen[:, :, None] == waiting.page[:, None, :, None]
        return merge(part, waiting.read(query, (mine if some is None else mine & some[:, :, None]).any(axis=3)))

    if groups == 1:
        return read(query, chosen[:, :, 0], None if some is None else some[:, :, 0])

    names = ("q", "raw_q", "position")
    first = "b k n p -> n b k p"
    pieces = (
        {name: cut_blocks(getattr(query, name), block) for name in names},
        rearrange(chosen, first),
        None if some is None else rearrange(some, first),
    )
    rows, heads, _, top_k = chosen.shape
    together = even_batch(groups, GATHERED // (rows * heads * top_k * size * pages.k.shape[-1]))
    parts = jax.lax.map(
        lambda piece: read(dataclasses.replace(query, valid=None, **piece[0]), *piece[1:]),
        pieces,
        batch_size=None if in_host else together,  # from there pages come by slices, never gathered
    )
    return Partial(*(join_blocks(x, width) for x in parts))
