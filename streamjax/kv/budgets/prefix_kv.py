"""`Prefixes`: the same share of attention in every layer, found by search (PrefixKV, Wang et al., 2412.03409)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from streamjax.kv.budgets.budget import Budget


@dataclasses.dataclass(frozen=True)
class Prefixes(Budget):
    """A layer keeps as many of its tokens, the best first, as hold together a share p of all attention.

    The attention that a token gets is its mean over heads, summed over queries. Bisection finds the p, one for all
    layers, at which the sizes add up to the total.
    """

    @property
    def measures(self) -> bool:
        return True

    def measured(self, shares: Float[Array, "B K G C S"], before: Bool[Array, "B #K S"]) -> Float[Array, "B M"]:
        """The share that the best 1, 2, ... tokens hold."""
        got = jnp.sum(shares, axis=(1, 2, 3))
        held = jnp.cumsum(jnp.sort(got, axis=1, descending=True), axis=1)
        return held / jnp.maximum(held[:, -1:], jnp.finfo(held.dtype).tiny)

    def weights(
        self, total: int, layers: int, measured: Float[np.ndarray, "L M"] | None, most: int
    ) -> Float[np.ndarray, " L"]:
        assert measured is not None
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self._sizes(middle, measured).sum() < total else (low, middle)
        return self._sizes(high, measured).astype(np.float64)

    def _sizes(self, share: float, measured: Float[np.ndarray, "L M"]) -> np.ndarray:
        return np.array([np.searchsorted(held, share) + 1 for held in measured]).clip(max=measured.shape[1])
