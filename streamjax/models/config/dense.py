"""The dense MLP, in words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from streamjax.field_checks import Positive, Size, check_fields

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """An MLP of width `mlp_dim`: gated (SwiGLU, 2002.05202) or plain.

    gate_scale, out_scale: factors on the gate before its activation, and on the output (Falcon-H1).

    Example:
      >>> sj.DenseConfig(mlp_dim=1536).parameter_count(d_model=576)  # gate, up and down
      2654208
    """

    type_name: ClassVar[str] = "dense"
    own_norms: ClassVar[bool] = False  # whether it norms what it reads by itself

    mlp_dim: Size
    gated: bool = True
    activation: Activation = "silu"
    bias: bool = False
    gate_scale: Positive = 1.0
    out_scale: Positive = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.gate_scale != 1.0 and not self.gated:
            raise ValueError(f"DenseConfig.gate_scale is {self.gate_scale} without a gate: it needs gated=True")

    def parameter_count(self, d_model: int) -> int:
        """Number of parameters in a model of `d_model` channels."""
        ups = 2 if self.gated else 1
        return (ups + 1) * d_model * self.mlp_dim + self.bias * (ups * self.mlp_dim + d_model)
