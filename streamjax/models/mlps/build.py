"""The module that an MLP's config describes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from streamjax.models.config import DenseAndExpertsConfig, ExpertsConfig, MLPConfig
from streamjax.models.mlps.dense import MLP
from streamjax.models.mlps.dense_and_experts import DenseAndExperts
from streamjax.models.mlps.experts import Experts


def build_mlp(
    config: MLPConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0
) -> MLP | Experts | DenseAndExperts:
    """An MLP over `d_model` channels; see the modules."""
    if isinstance(config, DenseAndExpertsConfig):
        return DenseAndExperts(config, d_model, key, dtype, gain)
    if isinstance(config, ExpertsConfig):
        return Experts(config, d_model, key, dtype, gain)
    return MLP(config, d_model, key, dtype, gain)
