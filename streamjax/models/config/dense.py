"""The dense MLP, in words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from streamjax.field_checks import Size, check_fields

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """An MLP of width `mlp_dim`: gated (SwiGLU, 2002.05202) or plain."""

    type_name: ClassVar[str] = "dense"
    own_norms: ClassVar[bool] = False  # whether it norms what it reads by itself

    mlp_dim: Size
    gated: bool = True
    activation: Activation = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def parameter_count(self, d_model: int) -> int:
        """Number of parameters in a model of `d_model` channels."""
        ups = 2 if self.gated else 1
        return (ups + 1) * d_model * self.mlp_dim + self.bias * (ups * self.mlp_dim + d_model)
