"""A norm, in words."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from streamjax.field_checks import Finite, Interval, check_fields


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """RMSNorm (1910.07467) or LayerNorm. `offset` is added to the stored weight: 1.0 for Gemma.

    weight: whether there is one. Without, the norm has no parameters.

    Example:
      >>> sj.NormConfig(kind="layer", bias=True).parameter_count(576)  # a weight and a bias a channel
      1152
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: Annotated[float, Interval(0, 1, above=True)] = 1e-5
    offset: Finite = 0.0
    bias: bool = False
    weight: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bias and self.kind == "rms":
            raise ValueError("NormConfig.bias is for kind 'layer': RMSNorm has none")
        if not self.weight and (self.bias or self.offset):
            raise ValueError("NormConfig.weight is False: a norm without a weight has no bias and no offset")

    def parameter_count(self, width: int) -> int:
        """Number of parameters of a norm over `width` channels."""
        return width * (self.weight + self.bias)
