"""Recurrent token mixers with memories of special kinds, in words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from streamjax.field_checks import LATER, Positive, Size
from streamjax.models.config.norm import NormConfig
from streamjax.models.config.recurrent import RecurrentConfig


@dataclasses.dataclass(frozen=True)
class MoMConfig(RecurrentConfig):
    """Mixture of memories (2502.13685) over Gated DeltaNet: a token writes to the memories that it is routed to.

    num_heads: as many as `num_groups`: each has a query, and of each memory a key, a value, a decay and a state.
    memories: that tokens are routed to; one more is shared by all tokens.
    active: memories of a token, beside the shared one.
    conv_width: tokens that the convolution over queries, keys and values reads.
    norm: of a head's output, before it is gated.
    """

    type_name: ClassVar[str] = "mixture_of_memories"
    single_heads: ClassVar[bool] = True

    key_dim: Size
    value_dim: Size
    memories: Size = 4
    active: Size = 2
    conv_width: Size = 4
    norm: NormConfig = NormConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.active > self.memories:
            raise ValueError(f"MoMConfig.active is {self.active}: there are {self.memories} memories")

    @property
    def all_memories(self) -> int:
        """With the shared one, which is the last."""
        return self.memories + 1

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads * self.all_memories, self.key_dim, self.value_dim

    @property
    def group_channels(self) -> tuple[int, int, int, int, int]:
        """Of a group: the query, keys and values of all memories, the gate, and what writes and decays."""
        count = self.all_memories
        return self.key_dim, count * self.key_dim, count * self.value_dim, self.value_dim, 2 * count

    @property
    def conv_shape(self) -> tuple[int, ...]:
        return self.conv_width - 1, self.num_groups, sum(self.group_channels[:3])

    def parameter_count(self, d_model: int) -> int:
        conv = self.conv_width * self.num_groups * self.conv_shape[-1]
        ends = d_model * (self.projected + self.num_heads * self.value_dim + self.memories)
        return ends + conv + 2 * self.num_heads * self.all_memories + self.norm.parameter_count(self.value_dim)


@dataclasses.dataclass(frozen=True)
class PrefixLinearConfig(RecurrentConfig):
    """Prefix linear attention (JRT-RNN, 2407.05483): linear attention that has looked at all of a prompt first.

    num_heads: as many as `num_groups`.
    key_dim: channels of a head's query and key, before their features; the paper has 16.
    features: "taylor": those whose product is 1 + s + s^2 / 2, s = q k / sqrt(key_dim) (Based, 2402.18668); "elu":
      1 + elu of each channel (2006.16236).
    """

    type_name: ClassVar[str] = "prefix_linear"
    single_heads: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    key_dim: Size = 16
    value_dim: Size = 64
    features: Literal["taylor", "elu"] = "taylor"

    @property
    def feature_dim(self) -> int:
        """Features of a key: of "taylor" a one, each channel, and each pair of channels once."""
        d = self.key_dim
        return 1 + d + d * (d + 1) // 2 if self.features == "taylor" else d

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Features, and the channels of a value with the sum of features behind them."""
        return self.num_heads, self.feature_dim, self.value_dim + 1

    @property
    def group_channels(self) -> tuple[int, int]:
        """Of a group: the query and as many of the key, and its value."""
        return 2 * self.key_dim, self.value_dim

    def parameter_count(self, d_model: int) -> int:
        first_look = self.num_heads * (self.key_dim + self.value_dim)
        return d_model * (self.projected + first_look + self.num_heads * self.value_dim)


@dataclasses.dataclass(frozen=True)
class LMUConfig(RecurrentConfig):
    """The Legendre memory unit in its parallel form (2102.11417), which LMUFormer (2402.04882) has in its blocks.

    num_heads: as many as `num_groups`: parts of `channels` channels, each of which has a memory.
    order: numbers of a memory: polynomials that tell what the channel was.
    theta: how many tokens back they tell it.
    unit: "plain"; "projected": with LMUFormer's product behind it; "spiking": that, and neurons that spike in place of
      ReLUs, before the unit and behind its memories. Then all parts together are as wide as the model.
    """

    type_name: ClassVar[str] = "legendre_memory"
    single_heads: ClassVar[bool] = True

    channels: Size
    order: Size
    theta: Positive
    unit: Literal["plain", "projected", "spiking"] = dataclasses.field(default="plain", metadata=LATER)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Rows are polynomials and, of a spiking unit, as many potentials, and those of its input, u and its output."""
        return self.num_heads, 2 * self.order + 3 if self.unit == "spiking" else self.order, self.channels

    @property
    def group_channels(self) -> tuple[int]:
        """Of a group: what is remembered."""
        return (self.channels,)

    def parameter_count(self, d_model: int) -> int:
        inner = self.num_groups * self.channels
        count = (d_model + 1) * inner + inner * self.order * d_model + d_model + d_model * d_model
        count += 0 if self.unit == "plain" else d_model * d_model
        return count + (2 * (inner + inner * self.order + d_model) if self.unit == "spiking" else 0)


@dataclasses.dataclass(frozen=True)
class ConvEmbeddingConfig(RecurrentConfig):
    """LMUFormer's convolutional embedding of patches (2402.04882): convolutions of all channels, one behind the other.

    Each is followed by a ReLU and a norm, and one more stands beside the last. It has a layer to itself, the first one.

    num_heads: as many as `num_groups`: parts of `channels` channels each, together as wide as the model.
    depth: convolutions one behind the other.
    conv_width: tokens that each reads: the newest ones, where the paper's reads one ahead.
    spiking: neurons that spike in place of ReLUs, behind their norms; the last convolution has none.
    """

    type_name: ClassVar[str] = "conv_embedding"
    single_heads: ClassVar[bool] = True

    channels: Size
    depth: Size = 4
    conv_width: Size = 3
    spiking: bool = False

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Potentials of the neurons in front of each convolution but the first."""
        return (self.num_heads, self.depth, self.channels) if self.spiking else ()

    @property
    def group_channels(self) -> tuple[int]:
        return (self.channels,)

    @property
    def conv_shape(self) -> tuple[int, int, int]:
        """The newest inputs of each convolution."""
        return (self.depth + 1) * (self.conv_width - 1), self.num_groups, self.channels

    def parameter_count(self, d_model: int) -> int:
        return (self.depth + 1) * self.conv_width * d_model * d_model + 2 * self.depth * d_model


@dataclasses.dataclass(frozen=True)
class SpikingMixConfig(RecurrentConfig):
    """LMUFormer's channel mixer whose neurons spike (2402.04882), a layer without an MLP; without spikes it is an MLP.

    num_heads: as many as `num_groups`: parts of `width` of the model's channels and `channels` hidden ones each.
    """

    type_name: ClassVar[str] = "spiking_mix"
    single_heads: ClassVar[bool] = True

    width: Size
    channels: Size

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Potentials of the neurons in front of both products."""
        return self.num_heads, 1, self.width + self.channels

    @property
    def group_channels(self) -> tuple[int]:
        return (self.channels,)

    def parameter_count(self, d_model: int) -> int:
        return 2 * d_model * self.projected + self.projected + d_model + 2 * self.projected
