"""Token mixers that keep a state of fixed size, in words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from streamjax.field_checks import LATER, NotNegative, Positive, Size, check_fields
from streamjax.models.config.norm import NormConfig


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """What recurrent mixers have in common: a state of a fixed size, and nothing that attention has.

    Heads come in `num_groups` groups, which a mesh divides; where states are matrices a group shares queries and keys.
    """

    recurrent: ClassVar[bool] = True
    keys_of: ClassVar[None] = None
    single_heads: ClassVar[bool] = False  # whether every head is a group of its own
    looks_ahead: ClassVar[bool] = False  # whether a prefix is read before its first token is

    num_heads: Size
    num_groups: Size

    # What attention has and these mixers do not.
    rope: ClassVar[None] = None
    window: ClassVar[None] = None
    chunk: ClassVar[None] = None
    reach: ClassVar[None] = None
    sinks: ClassVar[int] = 0
    softcap: ClassVar[None] = None
    alibi_slopes: ClassVar[tuple[float, ...]] = ()
    qk_norm: ClassVar[None] = None
    sink_logits: ClassVar[bool] = False
    temperature: ClassVar[None] = None
    value_is_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"{type(self).__name__}.num_heads {self.num_heads} must be a multiple of num_groups {self.num_groups}"
            )
        if self.single_heads and self.group_size != 1:
            raise ValueError(
                f"{type(self).__name__}.num_heads {self.num_heads} must be num_groups, {self.num_groups}: a head has a "
                "group of its own"
            )

    @property
    def group_size(self) -> int:
        """Heads of a group (R)."""
        return self.num_heads // self.num_groups

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Heads, and the rows and columns of a head's state; empty where a convolution keeps all that there is."""
        raise NotImplementedError

    @property
    def group_channels(self) -> tuple[int, ...]:
        """Channels that a token's input becomes, of each kind, for one group."""
        raise NotImplementedError

    @property
    def conv_shape(self) -> tuple[int, ...]:
        """What a short convolution keeps: tokens, groups, channels of a group; empty without one."""
        return ()

    @property
    def bounds_shape(self) -> tuple[int, ...]:
        """Groups and a group's channels whose least decays are learned with other layers'; empty where none are."""
        return ()

    @property
    def handed_on(self) -> int:
        """Channels of a token that the mixer hands to the layers above, beside the residual stream."""
        return 0

    @property
    def received(self) -> int:
        """Channels that the mixer takes of what a layer below has handed on."""
        return 0

    @property
    def projected(self) -> int:
        """Channels that a token's input becomes, of all groups together."""
        return self.num_groups * sum(self.group_channels)

    def parameter_count(self, d_model: int) -> int:
        """Number of parameters in a model of `d_model` channels."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class GatedDeltaConfig(RecurrentConfig):
    """Gated DeltaNet (2412.06464) as Qwen3-Next has it: the delta rule with one decay a head.

    num_heads: heads of values, each with a state of `key_dim` x `value_dim`; `num_groups` heads of queries and keys.
    conv_width: tokens that the convolution over queries, keys and values reads.
    norm: of a head's output, before it is gated.
    negative_eigenvalues: a token writes up to twice its value in place of all of it, so that what its key holds can
      change its sign (2411.12537).
    """

    type_name: ClassVar[str] = "gated_delta"

    key_dim: Size
    value_dim: Size
    conv_width: Size = 4
    norm: NormConfig = NormConfig(eps=1e-6)
    negative_eigenvalues: bool = False

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.key_dim, self.value_dim

    @property
    def group_channels(self) -> tuple[int, int, int, int]:
        """Of a group: the query, as many of the key, values, as many gates, and what writes and decays."""
        return 2 * self.key_dim, self.group_size * self.value_dim, self.group_size * self.value_dim, 2 * self.group_size

    @property
    def conv_shape(self) -> tuple[int, ...]:
        return self.conv_width - 1, self.num_groups, sum(self.group_channels[:2])

    def parameter_count(self, d_model: int) -> int:
        conv = self.conv_width * self.num_groups * self.conv_shape[-1]
        ends = d_model * (self.projected + self.num_heads * self.value_dim)
        return ends + conv + 2 * self.num_heads + self.norm.parameter_count(self.value_dim)


@dataclasses.dataclass(frozen=True)
class KimiDeltaConfig(RecurrentConfig):
    """Kimi Delta Attention (2510.26692): the delta rule with a decay for each channel of a key.

    num_heads: as many as `num_groups`: every head has queries and keys of its own.
    rank: channels from which a token's decays are made, and as many from which its output gates are.
    conv_width: tokens that the convolution over queries, keys and values reads.
    norm: of a head's output, before it is gated.
    """

    type_name: ClassVar[str] = "kimi_delta"
    single_heads: ClassVar[bool] = True

    key_dim: Size
    value_dim: Size
    rank: Size
    conv_width: Size = 4
    norm: NormConfig = NormConfig()

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.key_dim, self.value_dim

    @property
    def group_channels(self) -> tuple[int, int, int]:
        """Of a group: the query and as many of the key, its value, and what writes."""
        return 2 * self.key_dim, self.value_dim, 1

    @property
    def conv_shape(self) -> tuple[int, ...]:
        return self.conv_width - 1, self.num_groups, sum(self.group_channels[:2])

    def parameter_count(self, d_model: int) -> int:
        conv = self.conv_width * self.num_groups * self.conv_shape[-1]
        ends = d_model * (self.projected + self.num_heads * self.value_dim + 2 * self.rank)
        ups = self.num_heads * ((self.rank + 1) * self.key_dim + self.rank * self.value_dim)
        return ends + conv + ups + self.num_heads + self.norm.parameter_count(self.value_dim)


@dataclasses.dataclass(frozen=True)
class SSDConfig(RecurrentConfig):
    """Mamba-2's state space duality (2405.21060): an update that adds, one decay a head, steps that tokens choose.

    num_heads: heads of `head_dim` channels, each with a state of `state_dim` x `head_dim`; `num_groups` of B and C.
    conv_width, conv_bias: of the convolution over inputs, B and C: how many tokens it reads, and whether it has a bias.
    bias: whether the projections have biases.
    norm: of the gated output, over the channels of a group of heads, or of all with `norm_groups` 1; None: there is
      none.
    norm_before_gate: the output is normed first, and then gated.
    step_min, step_max: bounds on a token's step; None: no upper one.
    scales: factors on what a token's input becomes: inputs of heads, B, C, gates, and steps before their bias; empty:
      none (Falcon-H1).
    out_scale: factor on the output.
    hands_on: layers above may take what the heads read, before their gates and norm (`GMUConfig`).
    copies: a new layer begins as one that copies (mimetic initialisation, 2410.11135): it hardly forgets, and C is B.
      B is made of the token before (not in the paper): a token reads what came behind its like. It says nothing of
      weights that are loaded.
    """

    type_name: ClassVar[str] = "ssd"

    head_dim: Size
    state_dim: Size
    conv_width: Size = 4
    conv_bias: bool = True
    bias: bool = False
    norm: NormConfig | None = NormConfig()
    norm_groups: Size | None = None
    norm_before_gate: bool = False
    step_min: NotNegative = 0.0
    step_max: Positive | None = None
    scales: tuple[Positive, ...] = ()
    out_scale: Positive = 1.0
    hands_on: bool = dataclasses.field(default=False, metadata=LATER)
    copies: bool = dataclasses.field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies and self.conv_width < 2:
            raise ValueError(
                "SSDConfig.copies needs a convolution that reads the token before: give conv_width of at least 2"
            )
        if self.norm_groups not in (None, 1, self.num_groups):
            raise ValueError(
                f"SSDConfig.norm_groups is {self.norm_groups}: use 1 or num_groups, which is {self.num_groups}"
            )
        if len(self.scales) not in (0, 5):
            raise ValueError(
                f"SSDConfig.scales has {len(self.scales)} factors: give five, of inputs, B, C, gates and steps, or none"
            )

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.state_dim, self.head_dim

    @property
    def handed_on(self) -> int:
        return self.num_heads * self.head_dim if self.hands_on else 0

    @property
    def group_channels(self) -> tuple[int, int, int, int]:
        """Of a group: inputs of its heads, B and C, as many gates as inputs, and a step for each head."""
        inputs = self.group_size * self.head_dim
        return inputs, 2 * self.state_dim, inputs, self.group_size

    @property
    def conv_shape(self) -> tuple[int, ...]:
        return self.conv_width - 1, self.num_groups, sum(self.group_channels[:2])

    def parameter_count(self, d_model: int) -> int:
        inner, channels = self.num_heads * self.head_dim, self.num_groups * self.conv_shape[-1]
        ends = d_model * (self.projected + inner) + self.bias * (self.projected + d_model)
        conv = channels * (self.conv_width + self.conv_bias)
        return ends + conv + 3 * self.num_heads + (0 if self.norm is None else self.norm.parameter_count(inner))


@dataclasses.dataclass(frozen=True)
class GatedConvConfig(RecurrentConfig):
    """A short convolution between two gates (LFM2, 2511.23404), whose newest inputs are all of its state.

    num_heads: as many as `num_groups`: parts of `channels` channels each, which together are the mixer's width.
    conv_width: tokens that the convolution reads.
    bias: whether projections and convolution have biases.
    """

    type_name: ClassVar[str] = "gated_conv"
    single_heads: ClassVar[bool] = True

    channels: Size
    conv_width: Size = 3
    bias: bool = False

    @property
    def state_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def group_channels(self) -> tuple[int, int, int]:
        """Of a group: the gate of what goes in, the gate of what comes out, and what goes in."""
        return self.channels, self.channels, self.channels

    @property
    def conv_shape(self) -> tuple[int, ...]:
        return self.conv_width - 1, self.num_groups, self.channels

    def parameter_count(self, d_model: int) -> int:
        inner = self.num_groups * self.channels
        return 4 * d_model * inner + self.conv_width * inner + self.bias * (4 * inner + d_model)


@dataclasses.dataclass(frozen=True)
class GMUConfig(RecurrentConfig):
    """A gated memory unit (SambaY, 2507.06607): gates on what the heads of a layer below have read; no state at all.

    num_heads: as many as `num_groups`: parts of `channels` channels each, together as many as are handed on.
    """

    type_name: ClassVar[str] = "gmu"
    single_heads: ClassVar[bool] = True

    channels: Size

    @property
    def state_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def received(self) -> int:
        return self.num_groups * self.channels

    @property
    def group_channels(self) -> tuple[int]:
        """Of a group: its gates."""
        return (self.channels,)

    def parameter_count(self, d_model: int) -> int:
        return 2 * d_model * self.received
