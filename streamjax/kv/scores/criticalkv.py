"""`CriticalKV`: what is attended to, weighed by how much its value moves the output (Feng et al., 2502.03805)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.field_checks import Fraction, Positive
from streamjax.kv.scores.score import Held
from streamjax.kv.scores.wrapped import Wrapped


@dataclasses.dataclass(frozen=True)
class CriticalKV(Wrapped):
    """The best by `score` stay for that; the others by it times the L1 norm of the value behind the output projection.

    `score` is one of attention: not negative. The norm is the mean over the query heads that share a key head. It is
    computed at each choice, for each token as much as one output projection costs.

    Args:
      score: how much attention tokens get.
      first: share of the tokens that stay which `score` alone chooses.
      epsilon: added to a token's share of all that `score` says, so that norms decide where there is no attention.
    """

    needs_outputs: ClassVar[bool] = True  # type: ignore[misc]

    first: Fraction = 0.5
    epsilon: Positive = 1e-4

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        assert held.outputs is not None
        worth = jnp.where(held.valid, self.score.rank(held), 0.0)
        total = jnp.sum(worth, axis=2, keepdims=True)
        share = worth / jnp.where(total > 0, total, 1.0)
        second = (share + self.epsilon) * moved_outputs(held.values, held.outputs)
        count = int(held.size * self.first)
        order = jnp.argsort(jnp.where(held.valid, -worth, jnp.inf), axis=2, stable=True)
        return jnp.where(jnp.argsort(order, axis=2) < count, jnp.inf, second)


def moved_outputs(v: Float[Array, "B K S V"], outputs: Float[Array, "K G V E"]) -> Float[Array, "B K S"]:
    """L1 norms of values behind the output projection, on average over the heads that share them."""
    v = v.astype(accumulator(v.dtype)).swapaxes(0, 1)

    def of_head(head: tuple[Array, Array]) -> Array:  # one at a time: the products are as wide as the model
        mine, weights = head
        norms = [jnp.sum(jnp.abs(jnp.einsum("bsv,ve->bse", mine, weight)), axis=-1) for weight in weights]
        return sum(norms[1:], norms[0]) / len(norms)

    return rearrange(jax.lax.map(of_head, (v, outputs.astype(v.dtype))), "k b s -> b k s")
