"""`Leverage`: keys that no others could stand in for stay (Compactor, Chari and Van Durme, 2507.08143)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.field_checks import Count, Positive
from streamjax.kv.scores.score import Held, Score


@dataclasses.dataclass(frozen=True)
class Leverage(Score):
    """Statistical leverage of a key before rotation: x' (X'X + ridge)^-1 x, X being the centred keys that compete.

    Args:
      sketch: channels that keys are projected to at random, the same draw always; none where 0, and leverage is exact.
      ridge: added to the diagonal, as a share of its mean.
    """

    sketch: Count = 0
    ridge: Positive = 1e-4

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        k = held.raw_k.astype(accumulator(held.k.dtype))
        there = held.valid[..., None]
        count = jnp.sum(there, axis=2, keepdims=True).clip(1)
        x = jnp.where(there, k - jnp.sum(jnp.where(there, k, 0), axis=2, keepdims=True) / count, 0)
        if self.sketch:
            drawn = np.random.default_rng(0).standard_normal((k.shape[-1], self.sketch)) / np.sqrt(self.sketch)
            x = jnp.einsum("bksd,de->bkse", x, jnp.asarray(drawn, x.dtype), precision="highest")
        gram = jnp.einsum("bksd,bkse->bkde", x, x, precision="highest")
        level = jnp.trace(gram, axis1=2, axis2=3)[..., None, None] / gram.shape[-1]
        eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
        factor = jnp.linalg.cholesky(gram + jnp.where(level > 0, self.ridge * level, 1.0) * eye)
        # the inverse of a small matrix and one product: solving for each key by itself takes CPUs far longer
        inverse = jax.scipy.linalg.solve_triangular(factor, jnp.broadcast_to(eye, factor.shape), lower=True)
        half = jnp.einsum("bkde,bkse->bksd", inverse, x, precision="highest")
        return jnp.sum(half * half, axis=3)
