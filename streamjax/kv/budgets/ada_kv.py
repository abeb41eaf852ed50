"""`OverHeads`: heads of a layer share its tokens (AdaKV, Feng et al., 2407.11550)."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Array, Bool, Float

from streamjax.field_checks import Fraction
from streamjax.kv.budgets.budget import Budget, scored_tier, with_scored
from streamjax.kv.budgets.uniform import Uniform
from streamjax.kv.cascade import Cascade
from streamjax.kv.tiers.pooled import Pooled


@dataclasses.dataclass(frozen=True)
class OverHeads(Budget):
    """In each layer the best tokens of all heads stay, and each head is sure of `floor` of an equal share.

    How many a head keeps follows from what it holds, at every choice (`Pooled`). `layers` divides the total over the
    layers: `OverHeads(layers=Pyramid())` is the paper's Ada-PyramidKV.
    """

    floor: Fraction = 0.2
    layers: Budget = dataclasses.field(default_factory=Uniform)

    @property
    def measures(self) -> bool:
        return self.layers.measures

    @property
    def measured_by(self) -> str:
        return self.layers.measured_by

    def measured(self, shares: Float[Array, "B K G C S"], before: Bool[Array, "B #K S"]) -> Float[Array, "B M"]:
        return self.layers.measured(shares, before)

    def weights(
        self, total: int, layers: int, measured: Float[np.ndarray, "L M"] | None, most: int
    ) -> Float[np.ndarray, " L"]:
        return self.layers.weights(total, layers, measured, most)

    def layer(self, cascade: Cascade, size: int) -> Cascade:
        held = scored_tier(cascade)
        options = {name: getattr(held, name) for name in ("score", "per_head", "every", "distance", "merge", "codec")}
        return with_scored(cascade, Pooled(size, floor=self.floor, **options))
