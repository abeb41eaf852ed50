"""Which pages are the best of each block of queries: as a list to gather, or as a mask over all of them.

A list needs a sort, and a block of queries can pay for it. Where every query of a chunk chooses for itself nobody needs
the order: the least of the best scores is found by counting.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from streamjax.kv.pages.kth_largest import kth_largest

RANKED = (128, 256, 512, 1024)  # as many pages are ranked as one of these is, where no more hold tokens


def best_pages(
    scores: Float[Array, "B #K n P"], top_k: int, held: Int32[Array, ""] | None = None
) -> Int32[Array, "B #K n top_k"]:
    """The `top_k` best pages, best first; of equal ones the first. Those behind the first `held` have scores of -inf.

    Example:
      >>> best_pages(jnp.array([[[[3.0, 5.0, 3.0, 3.0]]]]), 2).tolist()
      [[[[1, 0]]]]
    """
    return _of_first(lambda some: jax.lax.top_k(some, top_k)[1].astype(jnp.int32), scores, top_k, held)


def among_best(
    scores: Float[Array, "B #K n P"], top_k: int, held: Int32[Array, ""] | None = None
) -> Bool[Array, "B #K n P"]:
    """Whether each page is one of these; one with a score of -inf is none.

    Example:
      >>> among_best(jnp.array([[[[3.0, 5.0, 3.0, 3.0]]]]), 2)[0, 0, 0]
      Array([ True,  True, False, False], dtype=bool)
    """
    total = scores.shape[-1]

    def chosen(some: Array) -> Array:
        if some.dtype == jnp.float32:
            least = kth_largest(some, top_k)
        else:
            least = jax.lax.top_k(some, top_k)[0][..., -1:]
        there = some > -jnp.inf
        good = (some >= least) & there

        def first_of_equals(good: Array) -> Array:
            better = some > least
            room = top_k - jnp.sum(better, axis=-1, keepdims=True, dtype=jnp.int32)
            ties = good & ~better
            return better | (ties & (jnp.cumsum(ties, axis=-1, dtype=jnp.int32) <= room))

        many = jnp.sum(good, axis=-1, dtype=jnp.int32) > top_k
        good = jax.lax.cond(many.any(), first_of_equals, lambda good: good, good)
        return jnp.pad(good, [(0, 0)] * (good.ndim - 1) + [(0, total - good.shape[-1])])

    return _of_first(chosen, scores, top_k, held)


def _of_first(rank: Callable[[Array], Array], scores: Array, top_k: int, held: Int32[Array, ""] | None) -> Array:
    """`rank` of the scores, or of the first ones, where the rest is nothing: ranking a long list takes long."""
    total = scores.shape[-1]
    sizes = [size for size in RANKED if top_k < size < total]
    if held is None or not sizes:
        return rank(scores)
    enough = sum((held > size).astype(jnp.int32) for size in sizes)
    ways = [partial(lambda scores, first: rank(scores[..., :first]), first=size) for size in (*sizes, total)]
    found: Array = jax.lax.switch(enough, ways, scores)
    return found
