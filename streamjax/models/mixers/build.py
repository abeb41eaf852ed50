"""The module that a token mixer's config describes."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array

from streamjax.models.config import (
    AttentionConfig,
    ChannelMixConfig,
    ConvEmbeddingConfig,
    GatedConvConfig,
    GatedDeltaConfig,
    GatedLinearConfig,
    GMUConfig,
    HGRN2Config,
    HGRNConfig,
    KimiDeltaConfig,
    LatentAttentionConfig,
    LMUConfig,
    MixerConfig,
    MoMConfig,
    PrefixLinearConfig,
    RGLRUConfig,
    RWKV7Config,
    SpikingMixConfig,
    SSDConfig,
)
from streamjax.models.mixers.attention import Attention
from streamjax.models.mixers.gated_conv import GatedConv
from streamjax.models.mixers.gated_delta import GatedDelta
from streamjax.models.mixers.gated_linear import GatedLinear
from streamjax.models.mixers.handed_on.channel_mix import ChannelMix
from streamjax.models.mixers.handed_on.gmu import GMU
from streamjax.models.mixers.handed_on.rwkv7 import RWKV7
from streamjax.models.mixers.hgrn import HGRN, HGRN2
from streamjax.models.mixers.kimi_delta import KimiDelta
from streamjax.models.mixers.latent import LatentAttention
from streamjax.models.mixers.memories.legendre import LMU
from streamjax.models.mixers.memories.lmuformer import ConvEmbedding, SpikingMix
from streamjax.models.mixers.memories.prefix_linear import PrefixLinear
from streamjax.models.mixers.memories.routed import MixtureOfMemories
from streamjax.models.mixers.rg_lru import RGLRU
from streamjax.models.mixers.ssd import SSD

Mixer: TypeAlias = (
    Attention
    | LatentAttention
    | GatedDelta
    | KimiDelta
    | SSD
    | GatedConv
    | RGLRU
    | GatedLinear
    | HGRN
    | HGRN2
    | MixtureOfMemories
    | PrefixLinear
    | LMU
    | ConvEmbedding
    | SpikingMix
    | RWKV7
    | ChannelMix
    | GMU
)

_MODULES: dict[type, Any] = {
    AttentionConfig: Attention,
    LatentAttentionConfig: LatentAttention,
    GatedDeltaConfig: GatedDelta,
    KimiDeltaConfig: KimiDelta,
    SSDConfig: SSD,
    GatedConvConfig: GatedConv,
    GMUConfig: GMU,
    RGLRUConfig: RGLRU,
    GatedLinearConfig: GatedLinear,
    HGRNConfig: HGRN,
    HGRN2Config: HGRN2,
    RWKV7Config: RWKV7,
    ChannelMixConfig: ChannelMix,
    MoMConfig: MixtureOfMemories,
    PrefixLinearConfig: PrefixLinear,
    LMUConfig: LMU,
    ConvEmbeddingConfig: ConvEmbedding,
    SpikingMixConfig: SpikingMix,
}


def build_mixer(config: MixerConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0) -> Mixer:
    """A mixer over `d_model` channels; see the modules."""
    return _MODULES[type(config)](config, d_model, key, dtype, gain)
