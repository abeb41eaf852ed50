"""The module that a token mixer's config describes."""

from __future__ import annotations

from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array

from streamjax.models.config import GatedConvConfig, GatedDeltaConfig, LatentAttentionConfig, MixerConfig, SSDConfig
from streamjax.models.mixers.attention import Attention
from streamjax.models.mixers.gated_conv import GatedConv
from streamjax.models.mixers.gated_delta import GatedDelta
from streamjax.models.mixers.latent import LatentAttention
from streamjax.models.mixers.ssd import SSD

Mixer: TypeAlias = Attention | LatentAttention | GatedDelta | SSD | GatedConv


def build_mixer(config: MixerConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0) -> Mixer:
    """A mixer over `d_model` channels; see the modules."""
    if isinstance(config, GatedDeltaConfig):
        return GatedDelta(config, d_model, key, dtype, gain)
    if isinstance(config, SSDConfig):
        return SSD(config, d_model, key, dtype, gain)
    if isinstance(config, GatedConvConfig):
        return GatedConv(config, d_model, key, dtype, gain)
    if isinstance(config, LatentAttentionConfig):
        return LatentAttention(config, d_model, key, dtype, gain)
    return Attention(config, d_model, key, dtype, gain)
