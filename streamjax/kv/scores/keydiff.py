"""`KeyDiff`: keys that differ most from the mean key stay (Park et al., 2504.15364)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.kv.scores.score import Held, Score


@dataclasses.dataclass(frozen=True)
class KeyDiff(Score):
    """Minus the cosine of a key with the mean direction of the keys that compete."""

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        unit = _unit(held.k.astype(accumulator(held.k.dtype)))
        mean = jnp.sum(jnp.where(held.valid[..., None], unit, 0), axis=2, keepdims=True)
        return -jnp.sum(unit * _unit(mean), axis=-1)


def _unit(x: Float[Array, "B K S D"]) -> Float[Array, "B K S D"]:
    """Of length one; a vector without a direction stays as it is."""
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(length > 0, length, 1.0)
