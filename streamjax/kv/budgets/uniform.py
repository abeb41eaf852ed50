"""`Uniform`: every layer the same."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from streamjax.kv.budgets.budget import Budget


@dataclasses.dataclass(frozen=True)
class Uniform(Budget):
    """Every layer keeps as many tokens as any other."""

    def weights(
        self, total: int, layers: int, measured: Float[np.ndarray, "L M"] | None, most: int
    ) -> Float[np.ndarray, " L"]:
        return np.ones(layers)
