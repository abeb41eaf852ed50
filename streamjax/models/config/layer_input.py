"""Inputs of single layers, beside the residual stream, in words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from streamjax.field_checks import Size, check_fields
from streamjax.models.config.dense import Activation


@dataclasses.dataclass(frozen=True)
class LayerInputConfig:
    """What each layer is told of its token by itself, apart from the residual stream (Gemma 3n, Gemma 4 E2B and E4B).

    A second embedding table has `channels` of a token for every layer; what the first one gives is projected to as many
    and added. Behind its MLP the layer gates them by its own output, projects and norms them, and adds the result.
    """

    type_name: ClassVar[str] = "layer_input"

    channels: Size
    activation: Activation = "gelu_tanh"

    def __post_init__(self) -> None:
        check_fields(self)

    def parameter_count(self, d_model: int) -> int:
        return 2 * d_model * self.channels
