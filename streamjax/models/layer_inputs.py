"""Inputs of single layers beside the residual stream, as Gemma 3n and Gemma 4 E2B and E4B have them.

A second table has some channels of each token for every layer. What the first layer reads is projected to as many, and
both are added: `(norm(project(x)) + table[token]) / sqrt(2)`. They stand behind the residual stream's channels, those
of the next layer first, and each layer puts what it has read behind the others: so equal layers are equal programs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from streamjax.models.config import LayerInputConfig, NormConfig
from streamjax.models.mlps.dense import ACTIVATIONS
from streamjax.models.norms import Norm
from streamjax.models.parameters import kernel, product
from streamjax.models.quantisation import take_rows


class LayerInputs(nnx.Module):
    """What all layers are told of a token: `table` [V, L P] and `projection` [E, L P], for L layers of P channels."""

    def __init__(
        self, vocab: int, d_model: int, width: int, channels: int, norm: NormConfig, key: Array, dtype: jnp.dtype
    ):
        key_table, key_projection = jax.random.split(key)
        self.channels = channels
        self.table = kernel(key_table, (vocab, width), ("vocab", "latent"), channels, dtype, inputs=(1,))
        self.projection = kernel(key_projection, (d_model, width), ("embed", "latent"), d_model, dtype)
        self.norm = Norm(channels, norm, dtype, "latent")

    def __call__(self, tokens: Int[Array, "B T"], x: Float[Array, "B T E"]) -> Float[Array, "B T I"]:
        """What the layers are told of tokens whose embeddings, as the first layer reads them, are `x`."""
        own = take_rows(self.table[...], tokens, x.dtype) * jnp.asarray(math.sqrt(self.channels), x.dtype)
        made = product("bte,ei->bti", x, self.projection[...]) * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)
        made = self.norm(made.reshape(*made.shape[:2], -1, self.channels)).reshape(made.shape)
        return (made + own) * jnp.asarray(math.sqrt(0.5), x.dtype)


class LayerInput(nnx.Module):
    """What a layer makes of its input: `norm(out(act(gate(x)) * input))`, which is added to `x`."""

    def __init__(
        self, config: LayerInputConfig, d_model: int, norm: NormConfig, key: Array, dtype: jnp.dtype, gain: float
    ):
        key_gate, key_out = jax.random.split(key)
        d, width = d_model, config.channels
        self.activation = config.activation
        self.gate = kernel(key_gate, (d, width), ("embed", "latent"), d, dtype)
        self.out = kernel(key_out, (width, d), ("latent", "embed"), width, dtype, gain)
        self.norm = Norm(d, norm, dtype)

    def __call__(self, x: Float[Array, "B T E"], given: Float[Array, "B T P"]) -> Float[Array, "B T E"]:
        gates = ACTIVATIONS[self.activation](product("bte,ep->btp", x, self.gate[...]))
        return self.norm(product("btp,pe->bte", gates * given, self.out[...]))
