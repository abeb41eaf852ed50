"""The parameterised pieces of a decoder block: norms, projections, MLP.

Every parameter is an `nnx.Param` that names its dimensions (`axes=`), for `streamjax.parallel`. Kernels are stored
input-major (`[in, out]`), the layout that a one-row product reads fastest. Weights are cast to the dtype of their
input where they are used, so master weights can be float32 under bfloat16 activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.models.config import ModelConfig
from streamjax.models.lora.adapters import Adapter, add_adapted

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def kernel(
    key: Array, shape: Sequence[int], axes: Sequence[str], fan_in: int, dtype: jnp.dtype, gain: float = 1.0
) -> nnx.Param:
    """A weight drawn from a normal truncated at two deviations, of standard deviation `gain / sqrt(fan_in)`."""
    value = jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape), jnp.float32) * (gain / (0.88 * math.sqrt(fan_in)))
    return nnx.Param(value.astype(dtype), axes=tuple(axes))


def zeros(shape: Sequence[int], axes: Sequence[str], dtype: jnp.dtype) -> nnx.Param:
    """A parameter of zeros: a bias."""
    return nnx.Param(jnp.zeros(tuple(shape), dtype), axes=tuple(axes))


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


class Projections(nnx.Module):
    """Queries, keys and values from one fused product, and the product back to the residual stream.

    `qkv` is `[d_model, K, G + 2, D]`: for each key/value head its G query heads, then its key, then its value, so that
    one product reads the input once and tensor parallelism splits over key/value heads. Adapters (`lora.py`) change
    members of it: all queries of a group, its key, or its value.
    """

    def __init__(self, config: ModelConfig, key: Array, dtype: jnp.dtype):
        d, kv, group, width = config.d_model, config.num_kv_heads, config.group_size, config.head_dim
        self.config = config
        key_in, key_out = jax.random.split(key)
        axes = ("embed", "kv_heads", "group", "head_dim")
        self.qkv = kernel(key_in, (d, kv, group + 2, width), axes, d, dtype)
        self.qkv_bias = zeros((kv, group + 2, width), axes[1:], dtype) if config.qkv_bias else None
        gain = 1.0 / math.sqrt(2 * config.num_layers)
        axes = ("kv_heads", "group", "head_dim", "embed")
        self.out = kernel(key_out, (kv, group, width, d), axes, config.num_heads * width, dtype, gain)
        self.out_bias = zeros((d,), ("activation_embed",), dtype) if config.out_bias else None
        self.q_norm = Norm(width, config, dtype, rms=True) if config.qk_norm else None
        self.k_norm = Norm(width, config, dtype, rms=True) if config.qk_norm else None
        self.q_lora: Adapter | None = nnx.data(None)
        self.k_lora: Adapter | None = nnx.data(None)
        self.v_lora: Adapter | None = nnx.data(None)
        self.o_lora: Adapter | None = nnx.data(None)

    def split(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Queries, keys and values, normalised and clipped as the config says, not rotated."""
        group = self.config.group_size
        qkv = self._product(x, 0)
        q = qkv[..., :group, :].reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)
        return (q if self.q_norm is None else self.q_norm(q)), *self._keys(qkv[..., group:, :])

    def keys(self, x: Float[Array, "B T E"]) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Keys and values of `split`, without the work for the queries."""
        return self._keys(self._product(x, self.config.group_size))

    def _product(self, x: Float[Array, "B T E"], first: int) -> Float[Array, "B T K g D"]:
        """The fused product, from member `first` of each group on."""
        qkv = jnp.einsum("bte,ekgd->btkgd", x, self.qkv[:, :, first:].astype(x.dtype))
        key = self.config.group_size - first
        qkv = add_adapted(qkv, x, (self.q_lora, -first), (self.k_lora, key), (self.v_lora, key + 1))
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[:, first:].astype(x.dtype)
        return qkv if self.config.clip_qkv is None else jnp.clip(qkv, -self.config.clip_qkv, self.config.clip_qkv)

    def _keys(self, pair: Float[Array, "B T K 2 D"]) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        k, v = pair[..., 0, :], pair[..., 1, :]
        return (k if self.k_norm is None else self.k_norm(k)), v

    def join(self, heads: Float[Array, "B T H D"], dtype: jnp.dtype) -> Float[Array, "B T E"]:
        """Project the heads' outputs back to `d_model` channels."""
        # One matrix: contracted over its three head axes apart, XLA would transpose the weight at every call.
        weight = rearrange(self.out[...], "k g d e -> (k g d) e").astype(dtype)
        x = rearrange(heads, "b t h d -> b t (h d)").astype(dtype)
        y = jnp.einsum("btf,fe->bte", x, weight)
        y = y if self.o_lora is None else y + self.o_lora(x)
        return y if self.out_bias is None else y + self.out_bias[...].astype(dtype)


class MLP(nnx.Module):
    """Two-layer MLP, gated (SwiGLU, 2002.05202) or plain; gate and up projections are one product."""

    def __init__(self, config: ModelConfig, key: Array, dtype: jnp.dtype):
        d, width, gates = config.d_model, config.mlp_dim, 2 if config.gated_mlp else 1
        key_in, key_out = jax.random.split(key)
        self.activation = config.activation
        self.up = kernel(key_in, (d, gates, width), ("embed", "gates", "mlp"), d, dtype)
        self.up_bias = zeros((gates, width), ("gates", "mlp"), dtype) if config.mlp_bias else None
        gain = 1.0 / math.sqrt(2 * config.num_layers)
        self.down = kernel(key_out, (width, d), ("mlp", "embed"), width, dtype, gain)
        self.down_bias = zeros((d,), ("activation_embed",), dtype) if config.mlp_bias else None
        self.gate_lora: Adapter | None = nnx.data(None)
        self.up_lora: Adapter | None = nnx.data(None)
        self.down_lora: Adapter | None = nnx.data(None)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        hidden = jnp.einsum("bte,egf->btgf", x, self.up[...].astype(x.dtype))
        hidden = add_adapted(hidden, x, (self.gate_lora, 0), (self.up_lora, hidden.shape[-2] - 1))
        if self.up_bias is not None:
            hidden = hidden + self.up_bias[...].astype(x.dtype)
        active = ACTIVATIONS[self.activation](hidden[..., 0, :])
        active = active * hidden[..., 1, :] if hidden.shape[-2] == 2 else active
        y = jnp.einsum("btf,fe->bte", active, self.down[...].astype(x.dtype))
        y = y if self.down_lora is None else y + self.down_lora(active)
        return y if self.down_bias is None else y + self.down_bias[...].astype(x.dtype)
