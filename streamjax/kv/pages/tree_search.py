"""Finding pages by a tree search: HiP's rule (2406.09827), whose cost grows with the logarithm of the pages.

The pages in the order of their buffer are cut into `top_k` ranges. Each range is cut in two, each half is scored by one
page in its middle, the best `top_k` halves stay; again, until a range is one page. What a range holds is guessed from
its middle: keys near each other are alike. `Pages(search="tree")` searches so, with any index for the pages' scores.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

Score = Callable[[Int32[Array, "B K N M"]], Float[Array, "B K N M"]]  # of some pages, for each of N searches


def tree_search(
    score: Score, held: Bool[Array, "B K N P"], top_k: int
) -> tuple[Int32[Array, "B K N top_k"], Bool[Array, "B K N top_k"]]:
    """The pages that the search ends at, best first, and which of them hold anything.

    Args:
      score: scores pages by their index.
      held: which pages hold tokens: the first ones of the buffer, or all but at most one.
      top_k: ranges that are followed.
    """
    pages = held.shape[-1]
    length = 1
    while top_k * length < pages:
        length *= 2
    place = jnp.arange(pages, dtype=jnp.int32)
    last = jnp.max(jnp.where(held, place, -1), axis=-1, keepdims=True)  # [B, K, N, 1]

    def middle(start: Array, length: Array | int) -> tuple[Array, Array]:
        """The page that stands for each range, and whether there is one: next to the middle where that is empty."""
        page = jnp.clip(jnp.minimum(start + length // 2, last), 0, pages - 1)
        there = jnp.take_along_axis(held, page, axis=-1)
        page = jnp.where(there, page, jnp.maximum(page - 1, start))
        page = jnp.clip(page, 0, pages - 1)
        return page, (start <= last) & jnp.take_along_axis(held, page, axis=-1)

    def ranked(start: Array, length: Array | int, count: int) -> tuple[Array, Array]:
        page, there = middle(start, length)
        scores, kept = jax.lax.top_k(jnp.where(there, score(page), -jnp.inf), count)
        return jnp.take_along_axis(start, kept, axis=-1), ~jnp.isneginf(scores)

    start = jnp.broadcast_to(jnp.arange(top_k, dtype=jnp.int32) * length, (*held.shape[:-1], top_k))
    if length == 1:
        start = jnp.where(start < pages, start, pages)  # fewer pages than are asked for: the rest is nowhere
    start, some = ranked(start, length, top_k)
    if length > 1:  # a loop, which compilers see once

        def halve(_: Array, found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            start, _, length = found
            length //= 2
            return *ranked(jnp.concatenate((start, start + length), axis=-1), length, top_k), length

        start, some, _ = jax.lax.fori_loop(0, length.bit_length() - 1, halve, (start, some, jnp.int32(length)))
    return jnp.clip(start, 0, pages - 1), some
