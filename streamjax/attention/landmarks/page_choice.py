"""Which pages of a memory queries read: the best by their landmarks' scores, among those that they may see."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import accumulator

GROUP = 64  # scores of which the largest are found by their groups' largest first
SPAN = 2048  # pages that are scored at a time, of more than twice as many: then those that are empty yet are left out


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


def choose(
    landmarks: Float[Array, "B K P D"], retrieval: Float[Array, "B C K D"], visible: VisiblePages, top_k: int
) -> tuple[Int32[Array, "B K C top_k"], Float[Array, "B K C top_k"]]:
    """The best pages of each query and their weights, the softmax of their scores; 0 for those it may not see.

    Scores are differentiable, the choice is not.
    """
    dtype, count = accumulator(retrieval.dtype), landmarks.shape[2]
    scale = 1 / math.sqrt(landmarks.shape[-1])
    if count > 2 * SPAN:
        chosen, some = _search(*jax.lax.stop_gradient((landmarks, retrieval)), visible, top_k)
        picked = jnp.take_along_axis(landmarks[:, :, None], chosen[..., None], axis=3)
        found = jnp.einsum("bckd,bkcnd->bkcn", retrieval, picked, preferred_element_type=dtype) * scale
        found = jnp.where(some, found, -jnp.inf)
    else:
        scores = jnp.einsum("bckd,bkpd->bkcp", retrieval, landmarks, preferred_element_type=dtype)
        scores = jnp.where(visible.mask(), scores * scale, -jnp.inf)
        chosen = top_indices(jax.lax.stop_gradient(scores), top_k)
        found = jnp.take_along_axis(scores, chosen, axis=-1)
        some = ~jnp.isneginf(found)
    top = jax.lax.stop_gradient(jnp.max(jnp.where(some, found, jnp.finfo(dtype).min), axis=-1, keepdims=True))
    weights = jnp.where(some, jnp.exp(jnp.where(some, found - top, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return chosen, weights / jnp.where(total > 0, total, 1)


def _search(
    landmarks: Float[Array, "B K P D"], retrieval: Float[Array, "B C K D"], visible: VisiblePages, top_k: int
) -> tuple[Int32[Array, "B K C top_k"], Bool[Array, "B K C top_k"]]:
    """Indices of the pages with the largest scores, and whether the query sees them.

    A memory has room for more pages than there are yet: spans behind the last one that a query may see are not scored.
    """
    count, dtype = landmarks.shape[2], accumulator(retrieval.dtype)
    spans = -(-count // SPAN)
    there = (visible.number >= 0) & (visible.number < jnp.max(visible.limit))
    filled = jnp.max(jnp.where(there, jnp.arange(1, count + 1), 0))

    def span(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        scores, largest = carry
        start = jnp.minimum(i * SPAN, count - SPAN)  # the last one begins earlier, with pages that were scored
        take = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, SPAN, axis)  # noqa: E731
        dots = jnp.einsum("bckd,bkpd->bkcp", retrieval, take(landmarks, 2), preferred_element_type=dtype)
        of_chunks = None if visible.of_chunks is None else take(visible.of_chunks, 1)
        seen = dataclasses.replace(visible, number=take(visible.number, 1), of_chunks=of_chunks).mask()
        seen &= start + jnp.arange(SPAN) >= i * SPAN
        dots = jnp.where(seen, dots, -jnp.inf)
        best = jnp.max(rearrange(dots, "... (n g) -> ... n g", g=GROUP), axis=-1)
        put = jax.lax.dynamic_update_slice_in_dim
        return put(scores, dots, i * SPAN, 3), put(largest, best, i * (SPAN // GROUP), 3)

    shape = (*landmarks.shape[:2], retrieval.shape[1])
    empty = jnp.zeros((*shape, spans * SPAN), dtype), jnp.full((*shape, spans * SPAN // GROUP), -jnp.inf, dtype)
    scores, largest = jax.lax.fori_loop(0, -(-filled // SPAN), span, empty)
    found, place = _best_of_groups(scores, largest, top_k)
    behind = jnp.maximum(spans * SPAN - count, 0)  # the last span lies at its own place, with its pages moved up
    return jnp.where(place >= (spans - 1) * SPAN, place - behind, place), ~jnp.isneginf(found)


def top_indices(scores: Float[Array, "*A P"], count: int) -> Int32[Array, "*A count"]:
    """Indices of the `count` largest scores, best first.

    Of many scores by their groups' largest: what is among the `count` largest is in one of the `count` best groups.
    """
    total = scores.shape[-1]
    if total <= 2 * GROUP * count:
        return jax.lax.top_k(scores, count)[1].astype(jnp.int32)
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, -total % GROUP)], constant_values=-jnp.inf)
    largest = jnp.max(rearrange(padded, "... (n g) -> ... n g", g=GROUP), axis=-1)
    return jnp.minimum(_best_of_groups(padded, largest, count)[1], total - 1)  # only scores of -inf can be padding


def _best_of_groups(
    scores: Float[Array, "*A P"], largest: Float[Array, "*A N"], count: int
) -> tuple[Float[Array, "*A count"], Int32[Array, "*A count"]]:
    """The `count` largest scores and their indices, given the largest of each group; -inf for groups that have none."""
    grouped = rearrange(scores, "... (n g) -> ... n g", g=GROUP)
    top, groups = jax.lax.top_k(largest, count)
    candidates = jnp.take_along_axis(grouped, groups[..., None], axis=-2)
    candidates = jnp.where(jnp.isneginf(top)[..., None], -jnp.inf, candidates)
    places = groups[..., None] * GROUP + jnp.arange(GROUP)
    found, best = jax.lax.top_k(rearrange(candidates, "... n g -> ... (n g)"), count)
    index = jnp.take_along_axis(rearrange(places, "... n g -> ... (n g)"), best, axis=-1)
    return found, index.astype(jnp.int32)
