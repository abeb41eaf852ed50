"""How much of its attention a query would give to each page, if a page were its landmark."""

from __future__ import annotations

from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

BLOCK = 128  # pages whose logits exist at a time, where a chunk asks


def landmark_shares(
    q: Float[Array, "B K G C D"],
    landmarks: Float[Array, "B K P D"],
    free: Bool[Array, "B K P"],
    scale: float | Float[Array, ""],
    held: Int32[Array, ""],
) -> Float[Array, "B K C P"]:
    """The logarithm of each page's share in the softmax over the pages that are `free`: of G heads, the largest.

    Args:
      q: queries, by the key head that they share.
      landmarks: one key a page.
      free: the pages among which heads choose; the others have -inf.
      held: no page from this one on is free. A chunk looks at no more, so it costs what is held and not the capacity.
    """

    def logits(start: Int32[Array, ""] | int, width: int) -> Float[Array, "B K G C w"]:
        some, open_ = (jax.lax.dynamic_slice_in_dim(x, start, width, 2) for x in (landmarks, free))
        found = jnp.einsum("bkgcd,bkpd->bkgcp", q, some, preferred_element_type=jnp.float32) * scale
        return jnp.where(open_[:, :, None, None], found, -jnp.inf)

    def shares(found: Float[Array, "B K G C w"], whole: Float[Array, "B K G C 1"]) -> Float[Array, "B K C w"]:
        # Head by head: a reduction over so few takes the CPU compiler longer than the product that made them.
        heads = (jnp.where(jnp.isfinite(whole), found - whole, -jnp.inf)[:, :, g] for g in range(found.shape[2]))
        return reduce(jnp.maximum, heads)

    pages = landmarks.shape[2]
    if q.shape[3] == 1 or pages <= BLOCK:
        every = logits(0, pages)
        return shares(every, jax.nn.logsumexp(every, axis=-1, keepdims=True))

    def start(turn: Int32[Array, ""]) -> Int32[Array, ""]:
        return jnp.minimum(turn * BLOCK, pages - BLOCK)  # the last ones are moved back to fit

    def add(turn: Int32[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        every, whole = carry
        some = logits(start(turn), BLOCK)
        fresh = start(turn) + jnp.arange(BLOCK, dtype=jnp.int32) >= turn * BLOCK
        more = jax.nn.logsumexp(jnp.where(fresh, some, -jnp.inf), axis=-1, keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(every, some, start(turn), 4), jnp.logaddexp(whole, more)

    nothing = jnp.full((*q.shape[:4], pages), -jnp.inf, jnp.float32)
    turns = (held + BLOCK - 1) // BLOCK
    every, whole = jax.lax.fori_loop(0, turns, add, (nothing, nothing[..., :1]))

    def share(turn: Int32[Array, ""], found: Array) -> Array:
        some = jax.lax.dynamic_slice_in_dim(every, start(turn), BLOCK, 4)
        return jax.lax.dynamic_update_slice_in_dim(found, shares(some, whole), start(turn), 3)

    return jax.lax.fori_loop(0, turns, share, nothing[:, :, 0])
