"""`Important`: as many tokens in a layer as its attention needs (ZipVL, He et al., 2410.08584)."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from streamjax.field_checks import Fraction
from streamjax.kv.budgets.prefix_kv import Prefixes


@dataclasses.dataclass(frozen=True)
class Important(Prefixes):
    """Layers share the total in proportion to the tokens, the best first, that hold the share `held` of a layer's
    attention: the fewest that do. The attention that a token gets is its mean over heads, summed over queries.
    """

    held: Fraction = 0.975

    @property
    def measured_by(self) -> str:
        return Prefixes.__name__

    def weights(
        self, total: int, layers: int, measured: Float[np.ndarray, "L M"] | None, most: int
    ) -> Float[np.ndarray, " L"]:
        assert measured is not None
        return self._sizes(self.held, measured).astype(np.float64)
