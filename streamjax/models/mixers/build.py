"""The module that a token mixer's config describes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from streamjax.models.config import LatentAttentionConfig, MixerConfig
from streamjax.models.mixers.attention import Attention
from streamjax.models.mixers.latent import LatentAttention


def build_mixer(
    config: MixerConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0
) -> Attention | LatentAttention:
    """A mixer over `d_model` channels; see the modules."""
    if isinstance(config, LatentAttentionConfig):
        return LatentAttention(config, d_model, key, dtype, gain)
    return Attention(config, d_model, key, dtype, gain)
