"""Trees of guesses from what heads say is probable, grown best first (EAGLE-2, 2406.16858)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

# From paths of 1, 2, ... tokens, log probabilities of what comes behind each of them.
Says = Callable[[Int32[Array, "B P i"]], Float[Array, "B P V"]]


def grow_tree(
    says: Says, certain: Int32[Array, " B"], ids: Int32[Array, " V"], length: int, width: int, nodes: int
) -> tuple[Int32[Array, "B N"], Int32[Array, "B N"]]:
    """Guesses behind the certain token of each stream and their parents, as `Drafts` has them.

    Args:
      says: who guesses; its paths begin with the certain token.
      certain: what each stream reads next.
      ids: the tokens that are guessed.
      length: levels of guesses.
      width: guesses of each level, the most probable of all behind those of the level before.
      nodes: guesses that are kept, those whose paths are the most probable.
    """
    rows = certain.shape[0]
    path = certain[:, None, None]
    score, node = jnp.zeros((rows, 1)), jnp.zeros((rows, 1), jnp.int32)
    tokens, parents, scores = [], [], []
    for level in range(length):
        best, which = jax.lax.top_k(says(path), width)
        score, at = jax.lax.top_k((score[..., None] + best).reshape(rows, -1), width)
        above = at // width
        token = ids[jnp.take_along_axis(which.reshape(rows, -1), at, axis=1)]
        tokens.append(token)
        parents.append(jnp.take_along_axis(node, above, axis=1))
        scores.append(score)
        node = jnp.broadcast_to(1 + level * width + jnp.arange(width, dtype=jnp.int32), (rows, width))
        path = jnp.concatenate((jnp.take_along_axis(path, above[:, :, None], axis=1), token[:, :, None]), axis=2)
    said, above, score = (jnp.concatenate(x, axis=1) for x in (tokens, parents, scores))
    return best_nodes(said, above, score, nodes)


def best_nodes(
    tokens: Int32[Array, "B M"], parents: Int32[Array, "B M"], scores: Float[Array, "B M"], nodes: int
) -> tuple[Int32[Array, "B N"], Int32[Array, "B N"]]:
    """The `nodes` guesses of the highest scores, in their order. No score is above that of the parent, so none of them
    loses it."""
    rank = jnp.argsort(jnp.argsort(-scores, axis=1, stable=True), axis=1)
    keeps = rank < nodes
    order = jnp.argsort(~keeps, axis=1, stable=True)[:, :nodes]
    number = jnp.pad(jnp.cumsum(keeps, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))  # of each node, the root's is 0
    tokens, parents = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, parents))
    return tokens, jnp.take_along_axis(number, parents, axis=1)
