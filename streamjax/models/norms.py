"""RMSNorm and LayerNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.models.config import ModelConfig
from streamjax.models.parameters import zeros


class Norm(nnx.Module):
    """RMSNorm (1910.07467) or LayerNorm over the last axis, computed in float32 (float64 for float64).

    `offset` is added to the weight (Gemma stores weight - 1).
    """

    def __init__(self, width: int, config: ModelConfig, dtype: jnp.dtype, *, rms: bool | None = None):
        self.rms = config.norm == "rms" if rms is None else rms
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        axis = ("activation_embed",) if width == config.d_model else ("head_dim",)
        self.weight = nnx.Param(jnp.full((width,), 1.0 - self.offset, dtype), axes=axis)
        self.bias = zeros((width,), axis, dtype) if not self.rms and config.norm_bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        dtype = accumulator(x.dtype)
        y = x.astype(dtype)
        if not self.rms:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * (self.weight[...].astype(dtype) + self.offset)
        if self.bias is not None:
            y = y + self.bias[...].astype(dtype)
        return y.astype(x.dtype)
