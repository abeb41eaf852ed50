"""A dense MLP and a mixture of experts beside each other, with norms of their own (Gemma 4)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from streamjax.models.config import DenseAndExpertsConfig
from streamjax.models.mlps.dense import MLP
from streamjax.models.mlps.experts import Experts
from streamjax.models.norms import Norm


class DenseAndExperts(nnx.Module):
    """The sum of both; `gain` scales the initial weights of what goes back to the residual stream.

    The router reads the tokens through a norm of its own, divided by sqrt(d_model).
    """

    def __init__(self, config: DenseAndExpertsConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        key_dense, key_experts = jax.random.split(key)
        self.dense = MLP(config.dense, d_model, key_dense, dtype, gain)
        self.experts = Experts(config.experts, d_model, key_experts, dtype, gain)
        self.dense_norm, self.experts_norm, self.router_norm, self.dense_post_norm, self.experts_post_norm = (
            Norm(d_model, config.norm, dtype) for _ in range(5)
        )

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        routed = self.router_norm(x) * jnp.asarray(1 / math.sqrt(x.shape[-1]), x.dtype)
        chosen = self.experts.chosen(self.experts_norm(x), routed)
        return self.dense_post_norm(self.dense(self.dense_norm(x))) + self.experts_post_norm(chosen)
