"""Hierarchical sparse attention over chunks: choose chunks by landmarks, attend inside each, weigh by the choice.

HSA of "Hardware-aligned Hierarchical Sparse Attention" (2504.16795), as HSA-UltraLong (2511.23319) uses it. A chunk of
S tokens has keys, values and one landmark. A token scores chunks by `r = retrieval . landmark / sqrt(D)`, takes the
best `top_k`, attends to each of them by a softmax of its own, and sums the outputs weighted by the softmax of their
scores. So the scores get gradients through the weights.

Two forms of the same sum: over all chunks with most weights zero, which is products of matrices, and over gathered
chunks, whose work does not grow with the context.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import accumulator
from streamjax.attention.blocks import cut_blocks, join_blocks

QUERY_BLOCK = 128  # queries whose logits exist at a time
SPANS = 8  # parts of a sequence that each work with as many chunks as their last query needs
GATHERED = 2**23  # keys times channels that are gathered at a time
DENSE_CHUNKS = 8  # the dense form works on at most so many times more chunks than are chosen
GROUP = 64  # scores of which the largest are found by their groups' largest first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """P chunks of S tokens: what a memory is made of.

    k, v: of their tokens, [B, K, P, S, D]. landmarks: [B, K, P, D].
    """

    k: Float[Array, "B K P S D"]
    v: Float[Array, "B K P S D"]
    landmarks: Float[Array, "B K P D"]

    def read(
        self,
        q: Float[Array, "B C H D"],
        retrieval: Float[Array, "B C K D"],
        visible: Visible,
        top_k: int,
        scale: float,
        sparse: bool | None = None,
        start: int | None = None,
    ) -> Float[Array, "B C H D"]:
        """The attention of queries to their chosen chunks; zero where a query sees no chunk.

        Args:
          q: queries of the attention inside chunks.
          retrieval: queries of the landmarks, one for each group of heads, which choose together.
          visible: which chunks each query may choose.
          top_k: chunks that a query reads, at most.
          scale: factor on the dot products inside chunks.
          sparse: gather the chosen chunks (True) or compute with all (False); by the number of chunks where None.
          start: the chunks lie in order from 0, and this is the first query's token of their sequence: then work on
            chunks that lie behind a query is left out.
        """
        count, width = self.k.shape[2], q.shape[1]
        if start is not None and width > QUERY_BLOCK:
            return self._in_order(q, retrieval, visible, top_k, scale, sparse, start)
        top_k = min(top_k, count)
        sparse = count > DENSE_CHUNKS * top_k if sparse is None else sparse
        rows, heads, _, size, channels = self.k.shape
        block = QUERY_BLOCK
        if sparse:
            block = max(1, min(block, GATHERED // (rows * heads * top_k * size * channels)))
        attend = jax.checkpoint(_gathered if sparse else _dense, static_argnums=(4, 5))
        if width <= block:
            return attend(self, q, retrieval, visible, top_k, scale)

        pieces = jax.tree.map(lambda x: cut_blocks(x, block), (q, retrieval, visible.limit, visible.segments))

        def piece(x: tuple[Array, Array, Array, Array | None]) -> Array:
            seen = dataclasses.replace(visible, limit=x[2], segments=x[3])
            return attend(self, x[0], x[1], seen, top_k, scale)

        return join_blocks(jax.lax.map(piece, pieces), width)

    def _in_order(
        self,
        q: Array,
        retrieval: Array,
        visible: Visible,
        top_k: int,
        scale: float,
        sparse: bool | None,
        start: int,
    ) -> Float[Array, "B C H D"]:
        """Some queries at a time, with the chunks before the last of them."""
        width, size = q.shape[1], self.k.shape[3]
        step = max(-(-width // SPANS), QUERY_BLOCK)
        outs = []
        for low in range(0, width, step):
            high = min(low + step, width)
            count = min((start + high - 1) // size, self.k.shape[2])
            if not count:
                outs.append(jnp.zeros_like(q[:, low:high], accumulator(q.dtype)))
                continue
            chunks = jax.tree.map(lambda x, count=count: x[:, :, :count], self)
            seen = dataclasses.replace(
                visible,
                number=visible.number[:, :count],
                limit=visible.limit[:, low:high],
                segments=None if visible.segments is None else visible.segments[:, low:high],
                of_chunks=None if visible.of_chunks is None else visible.of_chunks[:, :count],
            )
            outs.append(chunks.read(q[:, low:high], retrieval[:, low:high], seen, top_k, scale, sparse))
        return jnp.concatenate(outs, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
    """Which chunks each query may choose: those whose number is in 0 .. limit - 1.

    number: of each chunk in its stream, int32 [B, P], negative where there is none. limit: of each query, int32 [B, C]:
    the chunks that are complete before it. segments, of_chunks: segment ids of queries and of chunks where sequences
    are packed; a query sees the chunks of its own segment. -1 is a chunk of several segments, which none sees.
    """

    number: Int32[Array, "B P"]
    limit: Int32[Array, "B C"]
    segments: Int32[Array, "B C"] | None = None
    of_chunks: Int32[Array, "B P"] | None = None

    def mask(self) -> Bool[Array, "B 1 C P"]:
        seen = (self.number[:, None] >= 0) & (self.number[:, None] < self.limit[:, :, None])
        if self.segments is not None and self.of_chunks is not None:
            seen &= self.segments[:, :, None] == self.of_chunks[:, None]
        return seen[:, None]


def choose(
    landmarks: Float[Array, "B K P D"], retrieval: Float[Array, "B C K D"], visible: Visible, top_k: int
) -> tuple[Int32[Array, "B K C top_k"], Float[Array, "B K C top_k"]]:
    """The best chunks of each query and their weights, the softmax of their scores; 0 for those it may not see."""
    dtype = accumulator(retrieval.dtype)
    scores = jnp.einsum("bckd,bkpd->bkcp", retrieval, landmarks, preferred_element_type=dtype)
    scores = jnp.where(visible.mask(), scores / math.sqrt(landmarks.shape[-1]), -jnp.inf)
    chosen = largest(jax.lax.stop_gradient(scores), top_k)
    found = jnp.take_along_axis(scores, chosen, axis=-1)
    some = ~jnp.isneginf(found)
    top = jax.lax.stop_gradient(jnp.max(jnp.where(some, found, jnp.finfo(dtype).min), axis=-1, keepdims=True))
    weights = jnp.where(some, jnp.exp(jnp.where(some, found - top, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return chosen, weights / jnp.where(total > 0, total, 1)


def largest(scores: Float[Array, "*A P"], count: int) -> Int32[Array, "*A count"]:
    """Indices of the `count` largest scores, best first.

    Of many scores by their groups' largest: what is among the `count` largest is in one of the `count` best groups.
    """
    total = scores.shape[-1]
    if total <= 2 * GROUP * count:
        return jax.lax.top_k(scores, count)[1].astype(jnp.int32)
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, -total % GROUP)], constant_values=-jnp.inf)
    grouped = rearrange(padded, "... (n g) -> ... n g", g=GROUP)
    groups = jax.lax.top_k(jnp.max(grouped, axis=-1), count)[1]
    candidates = jnp.take_along_axis(grouped, groups[..., None], axis=-2)
    places = groups[..., None] * GROUP + jnp.arange(GROUP)
    best = jax.lax.top_k(rearrange(candidates, "... n g -> ... (n g)"), count)[1]
    found = jnp.take_along_axis(rearrange(places, "... n g -> ... (n g)"), best, axis=-1)
    return jnp.minimum(found, total - 1).astype(jnp.int32)  # only scores of -inf can be padding


def _dense(
    chunks: Chunks, q: Array, retrieval: Array, visible: Visible, top_k: int, scale: float
) -> Float[Array, "B C H D"]:
    """Over all chunks, those that are not chosen with a weight of zero."""
    dtype, heads = accumulator(q.dtype), chunks.k.shape[1]
    chosen, weights = choose(chunks.landmarks, retrieval, visible, top_k)
    spread = jnp.zeros((*chosen.shape[:-1], chunks.k.shape[2]), dtype)
    spread = jnp.put_along_axis(spread, chosen, weights, axis=-1, inplace=False)
    grouped = rearrange(q, "b c (k g) d -> b k g c d", k=heads)
    logits = jnp.einsum("bkgcd,bkpsd->bkgcps", grouped, chunks.k, preferred_element_type=dtype) * scale
    attention = jax.nn.softmax(logits, axis=-1) * spread[:, :, None, :, :, None]
    out = jnp.einsum("bkgcps,bkpsd->bckgd", attention.astype(q.dtype), chunks.v, preferred_element_type=dtype)
    return rearrange(out, "b c k g d -> b c (k g) d")


def _gathered(
    chunks: Chunks, q: Array, retrieval: Array, visible: Visible, top_k: int, scale: float
) -> Float[Array, "B C H D"]:
    """Over the chosen chunks alone."""
    dtype, heads = accumulator(q.dtype), chunks.k.shape[1]
    chosen, weights = choose(chunks.landmarks, retrieval, visible, top_k)
    flat = rearrange(chosen, "b k c n -> b k (c n) 1 1")

    def take(x: Array) -> Array:
        found = jnp.take_along_axis(x, flat, axis=2, mode="clip")
        return rearrange(found, "b k (c n) s d -> b k c n s d", n=top_k)

    grouped = rearrange(q, "b c (k g) d -> b k g c d", k=heads)
    logits = jnp.einsum("bkgcd,bkcnsd->bkgcns", grouped, take(chunks.k), preferred_element_type=dtype) * scale
    attention = jax.nn.softmax(logits, axis=-1) * weights[:, :, None, :, :, None]
    out = jnp.einsum("bkgcns,bkcnsd->bckgd", attention.astype(q.dtype), take(chunks.v), preferred_element_type=dtype)
    return rearrange(out, "b c k g d -> b c (k g) d")
