"""RMSNorm and LayerNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.models.config import NormConfig
from streamjax.models.parameters import zeros


class Norm(nnx.Module):
    """RMSNorm (1910.07467) or LayerNorm over the last axis, computed in float32 (float64 for float64).

    `offset` is added to the weight (Gemma stores weight - 1).
    """

    def __init__(self, width: int, config: NormConfig, dtype: jnp.dtype, axis: str = "activation_embed"):
        self.rms = config.kind == "rms"
        self.eps = config.eps
        self.offset = config.offset
        weight = jnp.full((width,), 1.0 - self.offset, dtype) if config.weight else None
        self.weight = None if weight is None else nnx.Param(weight, axes=(axis,))
        self.bias = zeros((width,), (axis,), dtype) if config.bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        dtype = accumulator(x.dtype)
        y = x.astype(dtype)
        if not self.rms:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.weight is not None:
            y = y * (self.weight[...].astype(dtype) + self.offset)
        if self.bias is not None:
            y = y + self.bias[...].astype(dtype)
        return y.astype(x.dtype)


class LastNorm(Norm):
    """The norm behind the last layer, of the first `width` channels: what layers hand on stands behind them."""

    def __init__(self, width: int, config: NormConfig, dtype: jnp.dtype):
        super().__init__(width, config, dtype)
        self.width = width

    def __call__(self, x: Float[Array, "*B W"]) -> Float[Array, "*B D"]:
        return super().__call__(x[..., : self.width])
