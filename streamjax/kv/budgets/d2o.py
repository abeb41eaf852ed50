"""`Density`: layers whose attention is dense keep more (D2O's layer rule, Wan et al., 2406.13035)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from streamjax.kv.budgets.budget import Budget


@dataclasses.dataclass(frozen=True)
class Density(Budget):
    """The attention that each token gets of all queries varies much where attention is sparse.

    Its variance over tokens, of each head, is scaled to the range that it has over the layer's heads, and v is the mean
    of that, as in the published code. A layer weighs exp(-v).
    """

    @property
    def measures(self) -> bool:
        return True

    def measured(self, shares: Float[Array, "B K G C S"], before: Bool[Array, "B #K S"]) -> Float[Array, "B M"]:
        got = jnp.sum(shares, axis=3).reshape(shares.shape[0], -1, shares.shape[4])
        variance = jnp.var(got, axis=2, ddof=min(1, got.shape[2] - 1))
        low, high = (fn(variance, axis=1, keepdims=True) for fn in (jnp.min, jnp.max))
        return jnp.mean((variance - low) / (high - low + 1e-6), axis=1, keepdims=True)

    def weights(
        self, total: int, layers: int, measured: Float[np.ndarray, "L M"] | None, most: int
    ) -> Float[np.ndarray, " L"]:
        assert measured is not None
        return np.exp(-np.asarray(measured, np.float64)[:, 0])
