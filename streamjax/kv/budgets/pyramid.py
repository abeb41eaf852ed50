"""`Pyramid`: sizes fall from layer to layer by one step (PyramidKV, Cai et al., 2406.02069)."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from streamjax.field_checks import Positive
from streamjax.kv.budgets.budget import Budget


@dataclasses.dataclass(frozen=True)
class Pyramid(Budget):
    """The last layer keeps the mean over `beta`, the first twice the mean less that; those between lie on the line.

    Where the first would keep more than there is, it keeps all of that, and the last as much more. Steps are not
    rounded down, as in the published code, but sizes, so that they add up to the total.

    Args:
      beta: the mean over the last layer's size.

    Example:
      >>> Pyramid().sizes(total=600, layers=6), Pyramid().sizes(total=600, layers=6, levels=3)
      ((195, 157, 119, 81, 43, 5), (176, 176, 100, 100, 24, 24))
    """

    beta: Positive = 20.0

    def weights(
        self, total: int, layers: int, measured: Float[np.ndarray, "L M"] | None, most: int
    ) -> Float[np.ndarray, " L"]:
        mean = total / layers
        last = mean / max(self.beta, 1)
        first = min(2 * mean - last, max(most, mean))
        return np.linspace(first, 2 * mean - first, layers) if layers > 1 else np.ones(1)
