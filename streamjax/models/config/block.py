"""A layer, in words: which token mixer, which MLP, and how they are joined to the residual stream."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, TypeAlias

from streamjax.field_checks import Positive, Size, check_fields, hashed_once
from streamjax.models.config.attention import AttentionConfig
from streamjax.models.config.dense import Activation, DenseConfig
from streamjax.models.config.elementwise import HGRNConfig, RGLRUConfig
from streamjax.models.config.experts import DenseAndExpertsConfig, ExpertsConfig
from streamjax.models.config.gated_linear import ChannelMixConfig, GatedLinearConfig, HGRN2Config, RWKV7Config
from streamjax.models.config.latent import LatentAttentionConfig
from streamjax.models.config.memory_mixers import (
    ConvEmbeddingConfig,
    LMUConfig,
    MoMConfig,
    PrefixLinearConfig,
    SpikingMixConfig,
)
from streamjax.models.config.norm import NormConfig
from streamjax.models.config.recurrent import (
    GatedConvConfig,
    GatedDeltaConfig,
    GMUConfig,
    KimiDeltaConfig,
    RecurrentConfig,
    SSDConfig,
)

AttentionMixerConfig: TypeAlias = AttentionConfig | LatentAttentionConfig
RecurrentMixerConfig: TypeAlias = (
    GatedDeltaConfig
    | KimiDeltaConfig
    | SSDConfig
    | GatedLinearConfig
    | HGRN2Config
    | HGRNConfig
    | GatedConvConfig
    | RGLRUConfig
    | MoMConfig
    | PrefixLinearConfig
    | LMUConfig
    | ConvEmbeddingConfig
    | SpikingMixConfig
    | RWKV7Config
    | ChannelMixConfig
    | GMUConfig
)
MixerConfig: TypeAlias = AttentionMixerConfig | RecurrentMixerConfig
MLPConfig: TypeAlias = DenseConfig | ExpertsConfig | DenseAndExpertsConfig


@hashed_once
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


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One layer of a decoder.

    mlp: None: the layer is its token mixer alone (Mamba).
    beside: a recurrent mixer that reads what attention reads; what both return is added (Falcon-H1).
    norm: of what a branch (mixer or MLP) reads, with `pre_norms`, and of what it returns, with `post_norms`, before the
      residual sum.
    residual: "sequential": the MLP reads what the mixer has added to; "parallel": both read the layer's input.
    shared_norm: in a parallel layer, one norm feeds both branches (Falcon 7B).
    residual_scale: factor on what a branch adds to the residual stream.
    layer_scale: the layer's output is multiplied by a number that its weights hold and training leaves alone (Gemma 4).
    layer_input: what the layer is told of its token apart from the residual stream; all layers of a model or none.

    Example:
      >>> attention = sj.AttentionConfig(num_heads=9, num_kv_heads=3, head_dim=64)
      >>> sj.BlockConfig(mixer=attention, mlp=sj.DenseConfig(mlp_dim=1536)).residual
      'sequential'
    """

    mixer: MixerConfig
    mlp: MLPConfig | None
    norm: NormConfig = NormConfig()
    pre_norms: bool = True
    post_norms: bool = False
    residual: Literal["sequential", "parallel"] = "sequential"
    shared_norm: bool = False
    residual_scale: Positive = 1.0
    layer_scale: bool = False
    beside: RecurrentMixerConfig | None = None
    layer_input: LayerInputConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.shared_norm and self.residual != "parallel":
            raise ValueError("BlockConfig.shared_norm needs residual='parallel'")
        if self.beside is not None and isinstance(self.mixer, RecurrentConfig):
            raise ValueError("BlockConfig.beside is for layers that attend: the token mixer is a recurrent one itself")
        if self.beside is not None and (self.beside.handed_on or self.beside.received):
            raise ValueError(
                "BlockConfig.beside hands nothing on and takes nothing: such a mixer has a layer to itself"
            )
        if self.beside is not None and (self.mixer.handed_on or self.mixer.received):
            raise ValueError("BlockConfig.beside is for layers that have their keys and values to themselves")
        if self.mlp is None and self.residual == "parallel":
            raise ValueError("BlockConfig.mlp is None: residual='parallel' is for layers with an MLP beside the mixer")
        if self.own_norms and self.residual == "parallel":
            raise ValueError("BlockConfig.mlp has norms of its own: it needs residual='sequential'")
        if not self.pre_norms and (self.shared_norm or not self.post_norms):
            raise ValueError("BlockConfig.pre_norms=False needs post_norms=True and shared_norm=False")

    def with_mixer(self, **changes: Any) -> BlockConfig:
        """The same layer with some fields of its token mixer changed.

        Raises:
          ValueError: the mixer is of a kind that lacks one of them.
        """
        known = {field.name for field in dataclasses.fields(self.mixer)}
        if lacking := sorted(set(changes) - known):
            raise ValueError(f"a token mixer of type {self.mixer.type_name!r} has no {lacking[0]}")
        return dataclasses.replace(self, mixer=dataclasses.replace(self.mixer, **changes))

    @property
    def attention(self) -> AttentionMixerConfig:
        """The token mixer, for what is about attention alone.

        Raises:
          ValueError: the layer is a recurrent one.
        """
        if isinstance(self.mixer, RecurrentConfig):
            raise ValueError("a recurrent layer has no attention")
        return self.mixer

    @property
    def recurrent(self) -> bool:
        """Whether the layer has a recurrent state, in place of keys and values or beside them."""
        return self.mixer.recurrent or self.beside is not None

    @property
    def handed_on(self) -> int:
        """Channels of a token that the layer hands to those above, beside the residual stream."""
        return self.mixer.handed_on

    @property
    def received(self) -> int:
        """Channels that the layer takes of what one below has handed on."""
        return self.mixer.received

    @property
    def own_norms(self) -> bool:
        """Whether the MLP norms what it reads by itself."""
        return self.mlp is not None and self.mlp.own_norms

    @property
    def norm_count(self) -> int:
        """How many norms of `d_model` channels the layer has."""
        branches = 1 if self.mlp is None else 2
        before = 1 if self.shared_norm or self.own_norms else branches
        return before * self.pre_norms + branches * self.post_norms + (self.layer_input is not None)

    def parameter_count(self, d_model: int) -> int:
        """Number of parameters in a model of `d_model` channels."""
        found = (self.mixer, self.mlp, self.beside, self.layer_input)
        parts = sum(part.parameter_count(d_model) for part in found if part is not None)
        return parts + self.norm_count * self.norm.parameter_count(d_model) + self.layer_scale
