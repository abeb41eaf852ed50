"""Linear attention whose state forgets by channels of keys, RWKV-7's among it, in words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

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
    lower_bound: the least decay, from 0 to below 1 (see `rising_bounds`); "learned": of each channel, from a table that
      all layers share (`models/mixers/handed_on/learned_bounds.py`).
    norm: of the outputs of all heads together.
    """

    type_name: ClassVar[str] = "hgrn2"
    single_heads: ClassVar[bool] = True

    key_dim: Size
    value_dim: Size
    lower_bound: BelowOne | Literal["learned"] = 0.0
    norm: NormConfig = NormConfig()

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.key_dim, self.value_dim

    @property
    def bounds_shape(self) -> tuple[int, ...]:
        return (self.num_groups, self.key_dim) if self.lower_bound == "learned" else ()

    @property
    def group_channels(self) -> tuple[int, int, int]:
        """Of a group: the query, what decays are made of, and the value."""
        return self.key_dim, self.key_dim, self.value_dim

    def parameter_count(self, d_model: int) -> int:
        inner = self.num_heads * self.value_dim
        return d_model * (self.projected + inner) + self.norm.parameter_count(inner)


@dataclasses.dataclass(frozen=True)
class RWKV7Config(RecurrentConfig):
    """RWKV-7's time mixing (2503.14456): the delta rule generalised, with a decay and a learning rate for each channel.

    num_heads: as many as `num_groups`, of `head_dim` channels each; together they are the model's width.
    rank: channels from which a token's decays are made. rate_rank, gate_rank, value_rank: the same of learning rates,
      gates and shares of values; `rank` where None.
    norm_eps: of the norm of what a head reads.
    values: "hands_on": the layers above may mix this layer's values into their own, as the first layer of RWKV-7 does;
      "takes": a layer that does so; "own": neither.
    """

    type_name: ClassVar[str] = "rwkv7"
    single_heads: ClassVar[bool] = True

    head_dim: Size
    rank: Size = 32
    values: Literal["own", "hands_on", "takes"] = "own"
    rate_rank: Size | None = None
    gate_rank: Size | None = None
    value_rank: Size | None = None
    norm_eps: Positive = 64e-5

    @property
    def ranks(self) -> tuple[int, ...]:
        """Channels that decays, learning rates, gates and, if it takes some, shares of values are made from."""
        found = (self.rank, self.rate_rank or self.rank, self.gate_rank or self.rank)
        return (*found, self.value_rank or self.rank) if self.values == "takes" else found

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.head_dim, self.head_dim

    @property
    def group_channels(self) -> tuple[int, int, int]:
        """Of a group: the query (RWKV's receptance), the key and the value."""
        return self.head_dim, self.head_dim, self.head_dim

    @property
    def handed_on(self) -> int:
        return self.num_heads * self.head_dim if self.values == "hands_on" else 0

    @property
    def received(self) -> int:
        return self.num_heads * self.head_dim if self.values == "takes" else 0

    @property
    def conv_shape(self) -> tuple[int, int, int]:
        """The newest token's input, by heads."""
        return 1, self.num_groups, self.head_dim

    def parameter_count(self, d_model: int) -> int:
        inner, ranks = self.num_heads * self.head_dim, self.ranks
        # Mixes of six inputs; kernels; pairs of low rank, all but one with a bias; weights of keys, and the norm's two.
        kernels = d_model * (self.projected + inner) + sum(ranks) * (d_model + inner)
        return 6 * d_model + kernels + (len(ranks) - 1 + 3 + 2) * inner


@dataclasses.dataclass(frozen=True)
class ChannelMixConfig(RecurrentConfig):
    """RWKV-7's channel mixing (2503.14456): an MLP that reads a mix of the token and the one before, which it keeps.

    It has a layer to itself, without an MLP.

    num_heads: as many as `num_groups`: parts that a mesh may split, of `width` of the model's channels and `channels`
      of the hidden ones each.
    """

    type_name: ClassVar[str] = "channel_mix"
    single_heads: ClassVar[bool] = True

    width: Size
    channels: Size

    @property
    def state_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def group_channels(self) -> tuple[int]:
        return (self.channels,)

    @property
    def conv_shape(self) -> tuple[int, int, int]:
        """The newest token's input."""
        return 1, self.num_groups, self.width

    def parameter_count(self, d_model: int) -> int:
        return d_model + 2 * d_model * self.projected
