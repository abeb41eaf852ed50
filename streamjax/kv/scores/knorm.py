"""`KNorm`: keys of a small norm stay (Devoto et al., 2406.11430)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.kv.scores.score import Held, Score


@dataclasses.dataclass(frozen=True)
class KNorm(Score):
    """Minus the length of the key: in trained models short keys draw most attention."""

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        return -jnp.linalg.norm(held.k.astype(accumulator(held.k.dtype)), axis=-1)
