"""A mixture of experts: a router, and gated MLPs that each see the tokens which it sends them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import accumulator
from streamjax.models.config import ExpertsConfig
from streamjax.models.mlps.dense import ACTIVATIONS, MLP
from streamjax.models.mlps.grouped_product import grouped_product
from streamjax.models.mlps.routing_losses import with_routing_losses
from streamjax.models.parameters import kernel, zeros


class Experts(nnx.Module):
    """Gated MLPs, some of which are chosen for each token; no token is ever dropped.

    Tokens are sorted by expert, so that each projection of all experts is one grouped product. `gain` scales the
    initial weights of what goes back to the residual stream.
    """

    def __init__(self, config: ExpertsConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        d, width, experts = d_model, config.mlp_dim, config.num_experts
        key_router, key_in, key_out, key_shared, key_gate = jax.random.split(key, 5)
        self.config = config
        self.routing_total: int | None = None  # tokens that the routing losses are means over; None: those of a call
        self.router = kernel(key_router, (d, experts), ("embed", "router"), d, dtype)
        self.selection_bias = zeros((experts,), ("router",), dtype) if config.selection_bias else None
        self.up = kernel(key_in, (experts, d, 2, width), ("expert", "embed", "gates", "mlp"), d, dtype)
        self.down = kernel(key_out, (experts, width, d), ("expert", "mlp", "embed"), width, dtype, gain)
        self.router_bias = zeros((experts,), ("router",), dtype) if config.router_bias else None
        self.up_bias = zeros((experts, 2, width), ("expert", "gates", "mlp"), dtype) if config.bias else None
        self.down_bias = zeros((experts, d), ("expert", "activation_embed"), dtype) if config.bias else None
        self.shared = None if config.shared is None else MLP(config.shared, d, key_shared, dtype, gain)
        self.shared_gate = kernel(key_gate, (d, 1), ("embed", "gates"), d, dtype) if config.shared_gate else None

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        y = self.chosen(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * jax.nn.sigmoid(x @ self.shared_gate[...].astype(x.dtype))
        return y + shared

    def logits(self, tokens: Float[Array, "N E"]) -> Float[Array, "N X"]:
        """The router's logits, float32."""
        dtype = accumulator(tokens.dtype)
        logits = tokens.astype(dtype) @ self.router[...].astype(dtype)
        return logits if self.router_bias is None else logits + self.router_bias[...].astype(dtype)

    def route(self, logits: Float[Array, "N X"]) -> tuple[Int32[Array, "N A"], Float[Array, "N A"]]:
        """Each token's experts (A of them), the best first, and their weights."""
        scores = jax.nn.sigmoid(logits) if self.config.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
        _, experts = jax.lax.top_k(self._choosable(scores), self.config.experts_per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.config.normalize_weights:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return experts, weights * self.config.weight_scale

    def _choosable(self, scores: Float[Array, "N X"]) -> Float[Array, "N X"]:
        """What experts are chosen by: scores with their bias, those outside the token's groups at -inf."""
        if self.selection_bias is not None:
            scores = scores + self.selection_bias[...].astype(scores.dtype)
        config = self.config
        if config.groups_per_token == config.groups:
            return scores
        grouped = rearrange(scores, "n (g x) -> n g x", g=config.groups)
        best, _ = jax.lax.top_k(grouped, 2 if config.group_rank == "two best" else 1)
        _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), config.groups_per_token)
        open_ = jnp.any(chosen[..., None] == jnp.arange(config.groups), axis=1)
        return rearrange(jnp.where(open_[..., None], grouped, -jnp.inf), "n g x -> n (g x)")

    def chosen(self, tokens: Float[Array, "N E"]) -> Float[Array, "N E"]:
        """What the chosen experts make of the tokens."""
        logits = self.logits(tokens)
        experts, weights = self.route(logits)
        each, count = weights.shape[1], self.config.num_experts
        order = jnp.argsort(experts.reshape(-1))
        sizes = jnp.bincount(experts.reshape(-1), length=count).astype(jnp.int32)
        inputs = tokens[order // each]
        if self.config.weighted == "inputs":
            inputs = (inputs * weights.reshape(-1)[order, None]).astype(tokens.dtype)
            weights = jnp.ones_like(weights)
        hidden = grouped_product(inputs, self.up[...].reshape(count, tokens.shape[1], -1), sizes)
        if self.up_bias is not None:
            hidden = hidden + self.up_bias[...].reshape(count, -1).astype(hidden.dtype)[experts.reshape(-1)[order]]
        out = grouped_product(self._gated(*jnp.split(hidden, 2, axis=-1)), self.down[...], sizes)
        if self.down_bias is not None:
            out = out + self.down_bias[...].astype(out.dtype)[experts.reshape(-1)[order]]
        place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)
        out = out[place].reshape(*weights.shape, -1)
        y = jnp.einsum("nae,na->ne", out, weights, preferred_element_type=weights.dtype).astype(tokens.dtype)
        if not (self.config.balance_loss or self.config.z_loss):
            return y
        return with_routing_losses(y, logits, experts, self.config, self.routing_total or max(1, len(tokens)))

    def _gated(self, gate: Float[Array, "N F"], up: Float[Array, "N F"]) -> Float[Array, "N F"]:
        limit = self.config.swiglu_limit
        if limit is None:
            return ACTIVATIONS[self.config.activation](gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.config.swiglu_alpha * gate)
