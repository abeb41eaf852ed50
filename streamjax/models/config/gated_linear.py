"""Linear attention whose state forgets by channels of keys, in words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from streamjax.field_checks import BelowOne, Positive, Size
from streamjax.models.config.norm import NormConfig
from streamjax.models.config.recurrent import RecurrentConfig


@dataclasses.dataclass(frozen=True)
class GatedLinearConfig(RecurrentConfig):
    """Gated linear attention (2312.06635): an update that adds, a decay for each channel of a key.

    num_heads: as many as `num_groups`: every head has queries and keys of its own.
    rank: channels from which a token's decays are made.
    decay_power: decays are sigmoids to the power of one over this, so that they are near 1.
    norm: of a head's output, before it is gated.
    """

    type_name: ClassVar[str] = "gated_linear"
    single_heads: ClassVar[bool] = True

    key_dim: Size
    value_dim: Size
    rank: Size = 16
    decay_power: Positive = 16.0
    norm: NormConfig = NormConfig()

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.key_dim, self.value_dim

    @property
    def group_channels(self) -> tuple[int, int, int]:
        """Of a group: the query and as many of the key, its value, and as many gates."""
        return 2 * self.key_dim, self.value_dim, self.value_dim

    def parameter_count(self, d_model: int) -> int:
        ends = d_model * (self.projected + self.num_heads * self.value_dim + self.rank)
        return ends + (self.rank + 1) * self.num_heads * self.key_dim + self.norm.parameter_count(self.value_dim)


@dataclasses.dataclass(frozen=True)
class HGRN2Config(RecurrentConfig):
    """HGRN2 (2404.07904): what a channel of a key forgets is what it writes, so that keys are one less the decays.

    num_heads: as many as `num_groups`.
    key_dim: channels of a head's key, by which its state is expanded.
    lower_bound: the least decay, from 0 to below 1; see `rising_bounds`.
    norm: of the outputs of all heads together.
    """

    type_name: ClassVar[str] = "hgrn2"
    single_heads: ClassVar[bool] = True

    key_dim: Size
    value_dim: Size
    lower_bound: BelowOne = 0.0
    norm: NormConfig = NormConfig()

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.key_dim, self.value_dim

    @property
    def group_channels(self) -> tuple[int, int, int]:
        """Of a group: the query, what decays are made of, and the value."""
        return self.key_dim, self.key_dim, self.value_dim

    def parameter_count(self, d_model: int) -> int:
        inner = self.num_heads * self.value_dim
        return d_model * (self.projected + inner) + self.norm.parameter_count(inner)
