"""The dense MLP: two matrices, gated (SwiGLU, 2002.05202) or plain."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from streamjax.models.config import DenseConfig
from streamjax.models.lora.adapters import Adapter, add_adapted
from streamjax.models.parameters import kernel, product, zeros

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class MLP(nnx.Module):
    """Two-layer MLP, gated (SwiGLU, 2002.05202) or plain; gate and up projections are one product.

    `gain` scales the initial weights of what goes back to the residual stream.
    """

    def __init__(self, config: DenseConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        d, width, gates = d_model, config.mlp_dim, 2 if config.gated else 1
        key_in, key_out = jax.random.split(key)
        self.activation = config.activation
        self.gate_scale, self.out_scale = config.gate_scale, config.out_scale
        self.up = kernel(key_in, (d, gates, width), ("embed", "gates", "mlp"), d, dtype)
        self.up_bias = zeros((gates, width), ("gates", "mlp"), dtype) if config.bias else None
        self.down = kernel(key_out, (width, d), ("mlp", "embed"), width, dtype, gain)
        self.down_bias = zeros((d,), ("activation_embed",), dtype) if config.bias else None
        self.gate_lora: Adapter | None = nnx.data(None)
        self.up_lora: Adapter | None = nnx.data(None)
        self.down_lora: Adapter | None = nnx.data(None)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        hidden = product("bte,egf->btgf", x, self.up[...])
        hidden = add_adapted(hidden, x, (self.gate_lora, 0), (self.up_lora, hidden.shape[-2] - 1))
        if self.up_bias is not None:
            hidden = hidden + self.up_bias[...].astype(x.dtype)
        first = hidden[..., 0, :]
        active = ACTIVATIONS[self.activation](first if self.gate_scale == 1.0 else first * self.gate_scale)
        active = active * hidden[..., 1, :] if hidden.shape[-2] == 2 else active
        y = product("btf,fe->bte", active, self.down[...])
        y = y if self.down_lora is None else y + self.down_lora(active)
        y = y if self.down_bias is None else y + self.down_bias[...].astype(x.dtype)
        return y if self.out_scale == 1.0 else y * self.out_scale
