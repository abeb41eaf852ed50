"""`Clusters`: keeps much, reads the clusters that promise most, and estimates the next ones by one entry each.

RetroInfer's wave index (2505.02922). Tokens gather in segments; when a segment is full its keys are clustered for each
key head, and its tokens are stored cluster by cluster. For a query the clusters whose centroids fit best are attended
token by token; each of those that follow stands for its tokens by their mean key and mean value, which counts as often
as the cluster has tokens. With q . mean for a logit that is never more than its tokens have together (Jensen). What is
left is not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels.partial import Partial, accumulator, merge
from streamjax.attention.block_cutting import cut_blocks, even_batch, join_blocks
from streamjax.attention.dense import FEW_QUERIES, summed_over_queries
from streamjax.barriers import ordered_after
from streamjax.field_checks import Count, Size, check_fields
from streamjax.kv.pages.choice import among_best, best_pages
from streamjax.kv.pages.spherical_kmeans import nearest_centroids, runs_of
from streamjax.kv.pages.union_reading import QUERIES, read_union_of_neighbours
from streamjax.kv.query import KVSpec, KVTokens, Query
from streamjax.kv.slots.ring_buffer import write_linear
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.full import LinearState, append

UNIT = 8  # slots that neighbours gather together: a cluster seldom has as many tokens as it may
GATHERED = 2**22  # key values and logits of clusters that exist at a time for the queries of a chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClosedSegments:
    """A ring of clustered segments; `cursor` is the segment that the next one replaces.

    k, v, position: tokens, segment by segment, in a segment cluster by cluster, in each cluster in their order.
    centroid, value: the mean key and the mean value of each cluster. first: position of its oldest token. ahead: how
    far its tokens lie ahead of that one, on average. start: its first slot. count: its tokens, 0 where there is none.
    """

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S V"]
    position: UInt32[Array, "B K S"]
    centroid: Float[Array, "B K M D"]
    value: Float[Array, "B K M D"]
    first: UInt32[Array, "B K M"]
    ahead: Float[Array, "B K M"]
    start: Int32[Array, "B K M"]
    count: Int32[Array, "B K M"]
    cursor: Int32[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClustersState:
    """open: the segment that is being filled, in order. closed: those that were full."""

    open: LinearState
    closed: ClosedSegments


@dataclasses.dataclass(frozen=True)
class Clusters(Tier):
    """Keeps up to `capacity` tokens in clustered segments, beside the segment that is being filled, which is all read.

    The last tier of its cascade: when a segment is full the oldest one goes as a whole. Clusters are those of spherical
    k-means (see `nearest_centroids`); one of more than `most` tokens is cut, and every piece is a cluster of its own.
    Query heads that share a key head share its clusters, by the sum of their softmax shares over all centroids, as in
    the published code. A segment is clustered when the chunk that fills it is stored, and that chunk sees it token by
    token, so that chunks change nothing of what is stored.

    Args:
      segment: tokens a segment.
      capacity: tokens in all clustered segments, a multiple of `segment`.
      retrieve: clusters that are attended token by token, at most `clusters`, which is all.
      estimate: clusters after them that are estimated by their means.
      size: tokens a cluster on average, before large ones are cut.
      most: tokens that a cluster holds at most; `most` slots are read for each that is retrieved.
      iterations: of k-means.
      block: that many queries of a chunk choose together. 1 is exact; a prefill reads fewer bytes with more.

    Raises:
      ValueError: sizes that do not fit each other.
    """

    last_because: ClassVar[str] = "a segment leaves it as a whole"

    segment: Size
    capacity: Size
    retrieve: Size
    estimate: Count = 0
    size: Size = 16
    most: Size = 32
    iterations: Count = 10
    block: Size = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if self.capacity < self.segment or self.capacity % self.segment:
            segments = f"a multiple of the segment size {self.segment}"
            raise ValueError(f"Clusters.capacity must be {segments}, got {self.capacity}")
        if self.retrieve + self.estimate > self.clusters:
            there = f"{self.capacity} tokens make at most {self.clusters} clusters"
            raise ValueError(f"Clusters reads {self.retrieve} and estimates {self.estimate} clusters, but {there}")

    @property
    def slots(self) -> int:
        return self.capacity + self.segment

    @property
    def clusters(self) -> int:
        """The most clusters that there can be."""
        return self.capacity // self.segment * self._pieces

    @property
    def _centroids(self) -> int:
        return -(-self.segment // self.size)

    @property
    def _pieces(self) -> int:
        """The most clusters of a segment: each cluster leaves at most one piece that is not full."""
        return (self.segment + self._centroids * (self.most - 1)) // self.most

    def init(self, spec: KVSpec) -> ClustersState:
        def each_head(slots: int, dtype: jnp.dtype) -> Array:
            return jnp.zeros((spec.batch_size, spec.kv_heads, slots), dtype)

        closed = ClosedSegments(
            k=spec.buffer(self.capacity),
            v=spec.buffer(self.capacity),
            position=each_head(self.capacity, jnp.dtype(jnp.uint32)),
            centroid=spec.buffer(self.clusters),
            value=spec.buffer(self.clusters),
            first=each_head(self.clusters, jnp.dtype(jnp.uint32)),
            ahead=each_head(self.clusters, jnp.dtype(jnp.float32)),
            start=each_head(self.clusters, jnp.dtype(jnp.int32)),
            count=each_head(self.clusters, jnp.dtype(jnp.int32)),
            cursor=spec.counter(),
        )
        return ClustersState(LinearState.empty(spec, self.segment), closed)

    def store(self, state: ClustersState, tokens: KVTokens) -> ClustersState:
        def fill(_: Array | int, carry: tuple[ClustersState, Array]) -> tuple[ClustersState, Array]:
            state, valid = carry
            opened, rest = append(state.open, dataclasses.replace(tokens, valid=valid))
            full = opened.filled == self.segment
            closed = jax.lax.cond(full.any(), self._close, lambda closed, *_: closed, state.closed, opened, full)
            opened = dataclasses.replace(opened, filled=jnp.where(full, 0, opened.filled))
            return ClustersState(opened, closed), ordered_after(rest.valid, closed.cursor)

        width = tokens.k.shape[2]
        carry, rounds = (state, tokens.valid), 1 + (width - 1) // self.segment
        state, left = fill(0, carry) if rounds == 1 else jax.lax.fori_loop(0, rounds, fill, carry)
        if width == 1:
            return state
        return dataclasses.replace(state, open=append(state.open, dataclasses.replace(tokens, valid=left))[0])

    def _close(self, closed: ClosedSegments, opened: LinearState, full: Bool[Array, " B"]) -> ClosedSegments:
        """Cluster the open segment and write it over the oldest closed one, in the rows where it is `full`."""
        assigned = nearest_centroids(jax.lax.stop_gradient(opened.k), self._centroids, self.iterations)
        order, start, count = runs_of(assigned, self.most, self._pieces)

        def by_cluster(x: Array) -> Array:
            x = jnp.broadcast_to(x, (*order.shape, *x.shape[3:]))
            return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 3)), axis=2)

        k, v, position = map(by_cluster, (opened.k, opened.v, opened.position))
        slots, held = self._slots(start, count, self.most)
        share = held / jnp.maximum(count, 1)[..., None]

        def mean(x: Array) -> Array:
            tokens = _take(x, slots).astype(accumulator(x.dtype))
            return jnp.einsum("bkms,bkms...->bkm...", share.astype(tokens.dtype), tokens, precision="highest")

        places = _take(position, slots)
        first = places[..., 0]
        ahead = jnp.sum(share * (places - first[..., None]).astype(jnp.int32), axis=-1)
        start = start + (closed.cursor * self.segment)[:, None, None]
        made = dataclasses.replace(
            closed, k=k, v=v, position=position, centroid=mean(k), value=mean(v), first=first, ahead=ahead, start=start,
            count=count,
        )  # fmt: skip

        def put(buffer: Array, new: Array) -> Array:
            if buffer.ndim == 1:
                return (buffer + full) % (self.capacity // self.segment)
            width = new.shape[2]
            written = jnp.where(full, width, 0)
            return write_linear(buffer, new, closed.cursor * width, jnp.zeros_like(written), written, axis=2)

        return jax.tree.map(put, closed, made)

    def attend(self, state: ClustersState, query: Query, reach: int | None) -> Partial:
        opened, closed, width = state.open, state.closed, query.q.shape[1]
        exact = query.attend(opened.k, opened.v, opened.position, opened.valid, filled=opened.filled)
        if width == 1 or query.differentiable:
            return merge(exact, self._attend_by_blocks(closed, query))
        # For many tokens a stream has no cluster to choose, and for many more few.
        segments = self.capacity // self.segment
        sizes = sorted({max(segments // 4, 1), max(segments // 2, 1), segments})
        more = [jnp.any(closed.count[:, :, first * self._pieces :] > 0) for first in (0, *sizes[:-1])]

        def read(segments: int) -> Partial:
            return merge(exact, self._attend_by_blocks(self._first(closed, segments), query))

        ways: list[Callable[[], Partial]] = [lambda: exact, *(partial(read, size) for size in sizes)]
        return jax.lax.switch(sum(x.astype(jnp.int32) for x in more), ways)

    def _first(self, closed: ClosedSegments, segments: int) -> ClosedSegments:
        """The first segments alone."""
        tokens = ("k", "v", "position")
        cut = {}
        for field in dataclasses.fields(closed):
            each = self.segment if field.name in tokens else self._pieces
            x = getattr(closed, field.name)
            cut[field.name] = x if x.ndim == 1 else x[:, :, : segments * each]
        return ClosedSegments(**cut)

    def _attend_by_blocks(self, closed: ClosedSegments, query: Query) -> Partial:
        """Attention to the clusters of queries of which `block` choose together."""
        width = query.q.shape[1]
        each = self.block == 1 < width and not query.differentiable
        attend = self._attend_each if each else self._attend_clusters
        block = min(QUERIES if each else self.block, width)
        groups = -(-width // block)
        if groups == 1:
            return attend(closed, query)

        asks = jnp.ones(query.q.shape[:2], bool) if query.valid is None else query.valid
        pieces = {"q": query.q, "raw_q": query.raw_q, "position": query.position, "valid": asks}
        rows, heads, _, channels = closed.k.shape
        read = rows * (heads * self.retrieve * self.most * channels + query.q.shape[2] * block * self.clusters)
        parts = jax.lax.map(
            lambda piece: attend(closed, dataclasses.replace(query, **piece)),
            {name: cut_blocks(x, block) for name, x in pieces.items()},
            batch_size=None if each else even_batch(groups, GATHERED // read),
        )
        return Partial(*(join_blocks(x, width) for x in parts))

    def _attend_clusters(self, closed: ClosedSegments, query: Query) -> Partial:
        """Attention of queries that choose together to the clusters."""
        weights = _weights(_logits(closed, query))
        each = weights.reciprocal()
        if query.valid is not None:  # padding must not choose for others
            each = jnp.where(query.valid[:, None, None, :, None], each, 0.0)
        heads = summed_over_queries(weights.each, each[..., 0])
        scores = _of_clusters(
            closed, jnp.sum(rearrange(heads, "b (k g) m -> b k g m", k=each.shape[1]), axis=2)[:, :, None]
        )
        _, zone = self._zones(scores)
        chosen = best_pages(scores, min(self.retrieve, scores.shape[3]))[:, :, 0]
        retrieved = query.attend(*self._gather(closed, closed.start, closed.count, chosen, self.most))
        return self._with_estimate(closed, weights, retrieved, zone)

    def _attend_each(self, closed: ClosedSegments, query: Query) -> Partial:
        """Attention of neighbouring queries, each of which chooses by itself; they read what any has chosen."""
        weights = _weights(_logits(closed, query))
        first, zone = self._zones(_of_clusters(closed, jnp.sum(weights.each * weights.reciprocal(), axis=2)))
        heads, unit = closed.k.shape[1], min(UNIT, self.most)
        parts = -(-self.most // unit)
        begins = unit * jnp.arange(parts, dtype=jnp.int32)
        start = rearrange(closed.start[..., None] + begins, "b k m n -> b k (m n)")
        count = rearrange(jnp.clip(closed.count[..., None] - begins, 0, unit), "b k m n -> b k (m n)")

        def gather(chosen: Int32[Array, "B K N"]) -> tuple[Array, Array, Array, Array]:
            return self._gather(closed, start, count, chosen, unit)

        retrieved = read_union_of_neighbours(gather, query, first, heads, unit, count > 0)
        return self._with_estimate(closed, weights, retrieved, zone)

    def _zones(self, scores: Float[Array, "B K N M"]) -> tuple[Bool[Array, "B K N M"], Bool[Array, "B K N M"]]:
        """The clusters that are retrieved, and those that are estimated."""
        first, both = (
            among_best(scores, min(n, scores.shape[3])) for n in (self.retrieve, self.retrieve + self.estimate)
        )
        return first, both & ~first

    def _gather(
        self,
        closed: ClosedSegments,
        start: Int32[Array, "B K M"],
        count: Int32[Array, "B K M"],
        chosen: Int32[Array, "B K N"],
        each: int,
    ) -> tuple[Array, Array, Array, Array]:
        """The slots of some runs in a row, `each` of each: keys, values, positions, and which are their tokens."""
        start, count = (jnp.take_along_axis(x, chosen, axis=2) for x in (start, count))
        slots, held = self._slots(start, count, each)
        k, v, position = (
            rearrange(_take(x, slots), "b k m s ... -> b k (m s) ...") for x in (closed.k, closed.v, closed.position)
        )
        return k, v, position, rearrange(held, "b k m s -> b k (m s)")

    def _with_estimate(
        self,
        closed: ClosedSegments,
        weights: Weights,
        retrieved: Partial,
        zone: Bool[Array, "B K #C M"],
    ) -> Partial:
        """What was retrieved with the estimate of the clusters that follow."""
        if not self.estimate:
            return retrieved
        return merge(retrieved, _estimate(closed, weights, zone))

    def _slots(
        self, start: Int32[Array, "B K M"], count: Int32[Array, "B K M"], each: int
    ) -> tuple[Int32[Array, "B K M N"], Bool[Array, "B K M N"]]:
        """`each` slots for each run, and which of them hold its tokens."""
        index = jnp.arange(each, dtype=jnp.int32)
        return start[..., None] + index, index < count[..., None]


def _take(x: Array, slots: Int32[Array, "B K M N"]) -> Array:
    """What [B, K, S, ...] has in these slots, [B, K, M, N, ...]; anything for slots past its end."""
    index = rearrange(slots, "b k m n -> b k (m n)")
    found = jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 3)), axis=2, mode="clip")
    return found.reshape(*slots.shape, *x.shape[3:])


def _logits(closed: ClosedSegments, query: Query) -> Float[Array, "B K G C M"]:
    """The logit of each cluster's mean key, at its tokens' mean distance; -inf where there is no cluster."""
    centroid, heads = closed.centroid, closed.centroid.shape[1]
    grouped = rearrange(query.q, "b c (k g) d -> b k (g c) d", k=heads).astype(centroid.dtype)
    dtype = accumulator(centroid.dtype)
    if grouped.shape[2] <= FEW_QUERIES:  # keys on the left, as in `attend`: or the CPU compiler transposes them
        logits = jnp.swapaxes(jnp.einsum("bkmd,bknd->bkmn", centroid, grouped, preferred_element_type=dtype), 2, 3)
    else:
        logits = jnp.einsum("bknd,bkmd->bknm", grouped, centroid, preferred_element_type=dtype)
    logits = rearrange(logits, "b k (g c) m -> b k g c m", c=query.q.shape[1]) * query.scale
    if query.softcap is not None:
        logits = query.softcap * jnp.tanh(logits / query.softcap)
    if query.slopes is not None:
        behind = (query.position[:, None, :, None] - closed.first[:, :, None]).astype(jnp.int32) - closed.ahead[
            :, :, None
        ]
        logits -= rearrange(query.slopes, "(k g) -> k g 1 1", k=heads) * behind[:, :, None]
    return jnp.where(closed.count[:, :, None, None] > 0, logits, -jnp.inf)


def _of_clusters(closed: ClosedSegments, scores: Float[Array, "B K N M"]) -> Float[Array, "B K N M"]:
    """Scores by which clusters are chosen; -inf where there is none."""
    return jax.lax.stop_gradient(jnp.where(closed.count[:, :, None] > 0, scores, -jnp.inf))


class Weights(NamedTuple):
    """The exponentials of logits above `top`, and their sum: a softmax before its division."""

    each: Float[Array, "B K G C M"]
    total: Float[Array, "B K G C 1"]
    top: Float[Array, "B K G C 1"]

    def reciprocal(self) -> Float[Array, "B K G C 1"]:
        return jnp.where(self.total > 0, 1 / jnp.where(self.total > 0, self.total, 1.0), 0.0)


def _weights(logits: Float[Array, "B K G C M"]) -> Weights:
    """How much each cluster counts in a query's softmax over all."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    each = jnp.exp(logits - top)
    return Weights(each, jnp.sum(each, axis=-1, keepdims=True), top)


def _estimate(closed: ClosedSegments, weights: Weights, zone: Bool[Array, "B K #C M"]) -> Partial:
    """One entry for each cluster of the zone: its mean value, which counts as often as the cluster has tokens."""
    often = jnp.where(zone, closed.count[:, :, None], 0).astype(weights.each.dtype)
    each = weights.each * often[:, :, None]
    total = jnp.sum(each, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    dtype, each = each.dtype, each.astype(closed.value.dtype)
    out = jnp.einsum("bkgcm,bkmd->bkgcd", each, closed.value, preferred_element_type=dtype) / total
    lse = jnp.where(some, weights.top + jnp.log(total), -jnp.inf)[..., 0]
    return Partial(rearrange(out, "b k g c d -> b c (k g) d"), rearrange(lse, "b k g c -> b c (k g)"))
