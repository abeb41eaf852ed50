"""`Preferences`: by how spread and how unsteady a layer's attention is (CAKE, Qin et al., 2503.12491)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from streamjax.field_checks import Positive
from streamjax.kv.budgets.budget import Budget


@dataclasses.dataclass(frozen=True)
class Preferences(Budget):
    """Of the attention that the queries give to what came before them: its entropy H, summed over queries and heads,
    and its variance V over the queries, summed over tokens and heads. A layer weighs H^(1 / tau1) V^(1 / tau2).

    The paper cascades: with each layer of a prompt that is read, what earlier ones keep is cut again, so that the total
    is never exceeded. The sizes at the end are those of one division, which is what is done here.
    """

    tau1: Positive = 1.0
    tau2: Positive = 1.0

    @property
    def measures(self) -> bool:
        return True

    def measured(self, shares: Float[Array, "B K G C S"], before: Bool[Array, "B #K S"]) -> Float[Array, "B M"]:
        shares = jnp.where(before[:, :, None, None], shares, 0.0)
        entropy = -jnp.sum(shares * jnp.log(shares + 1e-10), axis=(1, 2, 3, 4))
        variance = jnp.sum(jnp.var(shares, axis=3, ddof=min(1, shares.shape[3] - 1)), axis=(1, 2, 3))
        return jnp.stack((entropy, variance), axis=1)

    def weights(
        self, total: int, layers: int, measured: Float[np.ndarray, "L M"] | None, most: int
    ) -> Float[np.ndarray, " L"]:
        assert measured is not None
        entropy, variance = np.maximum(np.asarray(measured, np.float64), 0).T
        return entropy ** (1 / self.tau1) * variance ** (1 / self.tau2)
