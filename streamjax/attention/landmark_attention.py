"""Hierarchical sparse attention over pages: choose pages by landmarks, attend inside each, weigh by the choice.

HSA of "Hardware-aligned Hierarchical Sparse Attention" (2504.16795), as HSA-UltraLong (2511.23319) uses it. A page (the
papers' chunk) of S tokens has keys, values and one landmark. A token scores pages by `r = retrieval . landmark /
sqrt(D)`, takes the best `top_k`, attends to each of them by a softmax of its own, and sums the outputs weighted by the
softmax of their scores. So the scores get gradients through the weights.

Three forms of the same sum: over all pages with most weights zero, which is products of matrices; over gathered pages,
whose work does not grow with the context; and the platform's kernel, which sorts queries by the pages that they chose,
so that its work is products of matrices and does not grow with the context either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import api
from pallas_kernels.api import platforms
from pallas_kernels.argument_checks import DTYPES
from pallas_kernels.partial import accumulator
from streamjax.attention.block_cutting import cut_blocks, join_blocks
from streamjax.attention.sharded import per_device_call

Implementation = Literal["dense", "gathered", "pallas"]
QUERY_BLOCK = 128  # queries whose logits exist at a time
SPANS = 8  # parts of a sequence that each work with as many pages as their last query needs
GATHERED = 2**23  # keys times channels that are gathered at a time
DENSE_CHUNKS = 8  # the dense form works on at most so many times more pages than are chosen
_NAMES = (  # of the dimensions of queries, keys, values, choices and weights
    ("batch", "length", "heads", None),
    *(("batch", "kv_heads", None, None, None),) * 2,
    *(("batch", "kv_heads", "length", None),) * 2,
)
GROUP = 64  # scores of which the largest are found by their groups' largest first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LandmarkPages:
    """P pages of S tokens: what a memory is made of.

    k, v: of their tokens, [B, K, P, S, D]. landmarks: [B, K, P, D].
    """

    k: Float[Array, "B K P S D"]
    v: Float[Array, "B K P S D"]
    landmarks: Float[Array, "B K P D"]

    def read(
        self,
        q: Float[Array, "B C H D"],
        retrieval: Float[Array, "B C K D"],
        visible: VisiblePages,
        top_k: int,
        scale: float,
        implementation: Implementation | None = None,
        start: int | None = None,
    ) -> Float[Array, "B C H D"]:
        """The attention of queries to their chosen pages; zero where a query sees no page.

        Args:
          q: queries of the attention inside pages.
          retrieval: queries of the landmarks, one for each group of heads, which choose together.
          visible: which pages each query may choose.
          top_k: pages that a query reads, at most.
          scale: factor on the dot products inside pages.
          implementation: compute with all pages ("dense"), gather the chosen ones ("gathered"), or take the platform's
            kernel ("pallas"); None chooses by shapes and platform, and logs a kernel once.
          start: the pages lie in order from 0, and this is the first query's token of their sequence: then work on
            pages that lie behind a query is left out.

        Raises:
          ValueError: an unknown implementation, or no kernel for the platform or for these arguments.
        """
        if implementation not in (None, "dense", "gathered", "pallas"):
            raise ValueError(f"unknown implementation {implementation!r}; use 'dense', 'gathered' or 'pallas'")
        if implementation is None and self._kernel_pays(q, top_k):
            platforms.log_choice("hierarchical attention over many chunks", "pallas")
            implementation = "pallas"
        parts = list(self._parts(visible, q.shape[1], start))
        if implementation == "pallas":
            found = [chunks._choices(retrieval[:, at], seen, top_k) for at, chunks, seen in parts]
            chosen, weights = (jnp.concatenate(x, axis=2) for x in zip(*found, strict=True))
            return per_device_call(
                lambda *arrays: api.hsa_attention(*arrays, scale=scale), _NAMES, _NAMES[0],
                (q, self.k, self.v, chosen, weights),
            )  # fmt: skip
        outs = [
            chunks._attend(q[:, at], retrieval[:, at], seen, top_k, scale, implementation) for at, chunks, seen in parts
        ]
        return jnp.concatenate(outs, axis=1)

    def _kernel_pays(self, q: Array, top_k: int) -> bool:
        """Whether there is a kernel, and it beats the others: there are too many pages to work with all of them, but
        not so many that none has two readers.
        """
        count, size = self.k.shape[2:4]
        if not q.shape[1] * min(top_k, count) >= count > DENSE_CHUNKS * top_k or size % (32 // self.k.dtype.itemsize):
            return False
        return platforms.platform_implementation() is not None and q.dtype == self.k.dtype and q.dtype.name in DTYPES

    def _attend(
        self, q: Array, retrieval: Array, visible: VisiblePages, top_k: int, scale: float, implementation: str | None
    ) -> Float[Array, "B C H D"]:
        """The dense or the gathered form."""
        rows, heads, count, size, channels = self.k.shape
        if not count:
            return jnp.zeros_like(q, accumulator(q.dtype))
        top_k, block = min(top_k, count), QUERY_BLOCK
        sparse = count > DENSE_CHUNKS * top_k if implementation is None else implementation == "gathered"
        if sparse:
            block = max(1, min(block, GATHERED // (rows * heads * top_k * size * channels)))

        def attend(q: Array, retrieval: Array, seen: VisiblePages) -> Array:
            return (_gathered if sparse else _dense)(self, q, retrieval, seen, top_k, scale)

        return _by_blocks(attend, block, (q, retrieval), visible)

    def _choices(
        self, retrieval: Array, visible: VisiblePages, top_k: int
    ) -> tuple[Int32[Array, "B K C top_k"], Float[Array, "B K C top_k"]]:
        """Pages that each query reads, -1 for none, and their weights."""
        rows, heads, count, _ = self.landmarks.shape
        if not count:
            none = jnp.full((rows, heads, retrieval.shape[1], top_k), -1, jnp.int32)
            return none, jnp.zeros_like(none, accumulator(retrieval.dtype))

        def best(retrieval: Array, seen: VisiblePages) -> tuple[Array, Array]:
            chosen, weights = choose(self.landmarks, retrieval, seen, min(top_k, count))
            chosen = jnp.where(weights > 0, chosen, -1)
            return jnp.swapaxes(chosen, 1, 2), jnp.swapaxes(weights, 1, 2)

        chosen, weights = (jnp.swapaxes(x, 1, 2) for x in _by_blocks(best, QUERY_BLOCK, (retrieval,), visible))
        missing = ((0, 0), (0, 0), (0, 0), (0, top_k - chosen.shape[3]))
        return jnp.pad(chosen, missing, constant_values=-1), jnp.pad(weights, missing)

    def _parts(
        self, visible: VisiblePages, width: int, start: int | None
    ) -> Iterator[tuple[slice, LandmarkPages, VisiblePages]]:
        """Some queries at a time, with the pages before the last of them; all at once where `start` is None."""
        step = width if start is None else max(-(-width // SPANS), QUERY_BLOCK)
        if start is None or step >= width:
            yield slice(None), self, visible
            return
        for low in range(0, width, step):
            at = slice(low, min(low + step, width))
            count = min((start + at.stop - 1) // self.k.shape[3], self.k.shape[2])
            seen = dataclasses.replace(
                visible,
                number=visible.number[:, :count],
                limit=visible.limit[:, at],
                segments=None if visible.segments is None else visible.segments[:, at],
                of_chunks=None if visible.of_chunks is None else visible.of_chunks[:, :count],
            )
            yield at, jax.tree.map(lambda x, count=count: x[:, :, :count], self), seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisiblePages:
    """Which pages each query may choose: those whose number is in 0 .. limit - 1.

    number: of each page in its stream, int32 [B, P], negative where there is none. limit: of each query, int32 [B, C]:
    the pages that are complete before it. segments, of_chunks: segment ids of queries and of pages where sequences
    are packed; a query sees the pages of its own segment. -1 is a page of several segments, which none sees.
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


def _by_blocks(function: Callable[..., Any], size: int, queries: tuple[Array, ...], visible: VisiblePages) -> Any:
    """`function(*queries, visible)`, whose results have queries second as its arguments have, for `size` at a time."""
    width, function = queries[0].shape[1], jax.checkpoint(function)
    if width <= size:
        return function(*queries, visible)

    def piece(x: tuple[tuple[Array, ...], Array, Array | None]) -> Any:
        return function(*x[0], dataclasses.replace(visible, limit=x[1], segments=x[2]))

    cut = jax.tree.map(lambda x: cut_blocks(x, size), (queries, visible.limit, visible.segments))
    return jax.tree.map(lambda x: join_blocks(x, width), jax.lax.map(piece, cut))


def choose(
    landmarks: Float[Array, "B K P D"], retrieval: Float[Array, "B C K D"], visible: VisiblePages, top_k: int
) -> tuple[Int32[Array, "B K C top_k"], Float[Array, "B K C top_k"]]:
    """The best pages of each query and their weights, the softmax of their scores; 0 for those it may not see."""
    dtype = accumulator(retrieval.dtype)
    scores = jnp.einsum("bckd,bkpd->bkcp", retrieval, landmarks, preferred_element_type=dtype)
    scores = jnp.where(visible.mask(), scores / math.sqrt(landmarks.shape[-1]), -jnp.inf)
    chosen = top_indices(jax.lax.stop_gradient(scores), top_k)
    found = jnp.take_along_axis(scores, chosen, axis=-1)
    some = ~jnp.isneginf(found)
    top = jax.lax.stop_gradient(jnp.max(jnp.where(some, found, jnp.finfo(dtype).min), axis=-1, keepdims=True))
    weights = jnp.where(some, jnp.exp(jnp.where(some, found - top, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return chosen, weights / jnp.where(total > 0, total, 1)


def top_indices(scores: Float[Array, "*A P"], count: int) -> Int32[Array, "*A count"]:
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
    chunks: LandmarkPages, q: Array, retrieval: Array, visible: VisiblePages, top_k: int, scale: float
) -> Float[Array, "B C H D"]:
    """Over all pages, those that are not chosen with a weight of zero."""
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
    chunks: LandmarkPages, q: Array, retrieval: Array, visible: VisiblePages, top_k: int, scale: float
) -> Float[Array, "B C H D"]:
    """Over the chosen pages alone."""
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
