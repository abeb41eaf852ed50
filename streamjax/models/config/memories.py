"""Recurrent token mixers with memories of special kinds, in words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from streamjax.field_checks import Positive, Size
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
class LMUConfig(RecurrentConfig):
    """The Legendre memory unit in its parallel form (2102.11417), which LMUFormer (2402.04882) has in its blocks.

    num_heads: as many as `num_groups`: parts of `channels` channels, each of which has a memory.
    order: numbers of a memory: polynomials that tell what the channel was.
    theta: how many tokens back they tell it.
    """

    type_name: ClassVar[str] = "legendre_memory"
    single_heads: ClassVar[bool] = True

    channels: Size
    order: Size
    theta: Positive

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.order, self.channels

    @property
    def group_channels(self) -> tuple[int]:
        """Of a group: what is remembered."""
        return (self.channels,)

    def parameter_count(self, d_model: int) -> int:
        inner = self.num_groups * self.channels
        return (d_model + 1) * inner + inner * self.order * d_model + d_model + d_model * d_model
