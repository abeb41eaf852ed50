"""Token mixers that keep one number a channel, in words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from streamjax.field_checks import BelowOne, Size
from streamjax.models.config.dense import Activation
from streamjax.models.config.norm import NormConfig
from streamjax.models.config.recurrent import RecurrentConfig


@dataclasses.dataclass(frozen=True)
class RGLRUConfig(RecurrentConfig):
    """Griffin's recurrent block (2402.19427): a convolution, the real-gated linear recurrent unit, and a gate.

    num_heads: as many as `num_groups`: blocks of `channels` channels, whose gates see the block's channels alone.
    conv_width: tokens that the convolution reads.
    activation: of the branch that gates the output.
    """

    type_name: ClassVar[str] = "rg_lru"
    single_heads: ClassVar[bool] = True

    channels: Size
    conv_width: Size = 4
    activation: Activation = "gelu_tanh"

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Of each block one row: its channels, and behind them whether a token has been read."""
        return self.num_heads, 1, self.channels + 1

    @property
    def group_channels(self) -> tuple[int, int]:
        """Of a group: what is convolved, and what gates."""
        return self.channels, self.channels

    @property
    def conv_shape(self) -> tuple[int, ...]:
        return self.conv_width - 1, self.num_groups, self.channels

    def parameter_count(self, d_model: int) -> int:
        inner = self.num_groups * self.channels
        ends = 3 * d_model * inner + 2 * inner + d_model
        return ends + (self.conv_width + 1) * inner + 2 * inner * (self.channels + 1) + inner


@dataclasses.dataclass(frozen=True)
class HGRNConfig(RecurrentConfig):
    """HGRN (2311.04823): each channel forgets as much as it writes, at least `lower_bound` of it staying.

    num_heads: as many as `num_groups`: parts of `channels` channels, which together are the mixer's width.
    lower_bound: the least decay, from 0 to below 1 (see `rising_bounds`); "learned": of each channel, from a table that
      all layers share (`models/mixers/handed_on/learned_bounds.py`).
    norm: of all channels together, before they are gated.
    """

    type_name: ClassVar[str] = "hgrn"
    single_heads: ClassVar[bool] = True

    channels: Size
    lower_bound: BelowOne | Literal["learned"] = 0.0
    norm: NormConfig = NormConfig()

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, 1, self.channels

    @property
    def bounds_shape(self) -> tuple[int, ...]:
        return (self.num_groups, self.channels) if self.lower_bound == "learned" else ()

    @property
    def group_channels(self) -> tuple[int, int, int]:
        """Of a group: inputs, what decays are made of, and output gates."""
        return self.channels, self.channels, self.channels

    def parameter_count(self, d_model: int) -> int:
        inner = self.num_heads * self.channels
        return 4 * d_model * inner + self.norm.parameter_count(inner)
