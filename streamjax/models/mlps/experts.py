"""A mixture of experts: a router, and MLPs that each see the tokens which it sends them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import accumulator
from streamjax.attention.sharded import per_device_call
from streamjax.models.config import ExpertsConfig
from streamjax.models.mlps.dense import MLP
from streamjax.models.mlps.expert_parallel import sum_on_mesh
from streamjax.models.mlps.routing_losses import with_routing_losses
from streamjax.models.mlps.routing_report import RoutingReport, with_report
from streamjax.models.mlps.sorted_experts import ExpertWeights
from streamjax.models.parameters import kernel, product, zeros


class Experts(nnx.Module):
    """MLPs, some of which are chosen for each token; no token is ever dropped.

    Tokens are sorted by expert, so that each projection of all experts is one grouped product. `gain` scales the
    initial weights of what goes back to the residual stream.
    """

    def __init__(self, config: ExpertsConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        d, width, experts = d_model, config.mlp_dim, config.num_experts
        key_router, key_in, key_out, key_shared, key_gate = jax.random.split(key, 5)
        self.config = config
        self.routing_total: int | None = None  # tokens that the routing losses are means over; None: those of a call
        self.router = kernel(key_router, (d, experts), ("embed", "router"), d, dtype, inputs=())
        self.selection_bias = zeros((experts,), ("router",), dtype) if config.selection_bias else None
        read, ups = config.latent or d, config.ups
        shape = (experts, read, ups, width)
        self.up = kernel(key_in, shape, ("expert", "embed", "gates", "mlp"), read, dtype, inputs=(1,))
        last = 1.0 if config.latent else gain
        self.down = kernel(key_out, (experts, width, read), ("expert", "mlp", "embed"), width, dtype, last, (1,))
        there, key_latent, key_back = config.latent is not None, *(jax.random.fold_in(key, i) for i in range(2))
        self.latent_in = kernel(key_latent, (d, read), ("embed", "latent"), d, dtype) if there else None
        self.latent_out = kernel(key_back, (read, d), ("latent", "embed"), read, dtype, gain) if there else None
        self.latent_in_bias = zeros((read,), ("latent",), dtype) if config.latent_bias else None
        self.latent_out_bias = zeros((d,), ("activation_embed",), dtype) if config.latent_bias else None
        scale = jnp.ones((experts,), dtype) if config.expert_scale else None
        self.expert_scale = None if scale is None else nnx.Param(scale, axes=("router",))
        self.router_bias = zeros((experts,), ("router",), dtype) if config.router_bias else None
        self.up_bias = zeros((experts, ups, width), ("expert", "gates", "mlp"), dtype) if config.bias else None
        self.down_bias = zeros((experts, read), ("expert", "activation_embed"), dtype) if config.bias else None
        self.report: RoutingReport | None = nnx.data(None)  # a place for what the router did, while it trains
        self.shared = None if config.shared is None else MLP(config.shared, d, key_shared, dtype, gain)
        self.shared_gate = (
            kernel(key_gate, (d, 1), ("embed", "gates"), d, dtype, inputs=()) if config.shared_gate else None
        )

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        y = self.chosen(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * jax.nn.sigmoid(x @ self.shared_gate[...].astype(x.dtype))
        return y + shared

    def logits(self, x: Float[Array, "B T E"]) -> Float[Array, "B T X"]:
        """The router's logits, float32."""
        dtype = accumulator(x.dtype)
        logits = x.astype(dtype) @ self.router[...].astype(dtype)
        return logits if self.router_bias is None else logits + self.router_bias[...].astype(dtype)

    def route(self, logits: Float[Array, "B T X"]) -> tuple[Int32[Array, "B T A"], Float[Array, "B T A"]]:
        """Each token's experts (A of them), the best first, and their weights."""
        scores = jax.nn.sigmoid(logits) if self.config.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
        biased = scores if self.selection_bias is None else scores + self.selection_bias[...].astype(scores.dtype)
        # By each device on its own tokens: the compiler would gather the scores of all devices for `top_k`.
        names = ("batch", "length", None)
        experts = per_device_call(self._choose, (names,), names, (jax.lax.stop_gradient(biased),))
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.config.normalize_weights:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        if self.expert_scale is not None:
            weights = weights * self.expert_scale[...].astype(weights.dtype)[experts]
        return experts, weights * self.config.weight_scale

    def _choose(self, scores: Float[Array, "B T X"]) -> Int32[Array, "B T A"]:
        """The experts with the highest scores, of those in the token's groups."""
        config = self.config
        if config.groups_per_token < config.groups:
            grouped = rearrange(scores, "b t (g x) -> b t g x", g=config.groups)
            best, _ = jax.lax.top_k(grouped, 2 if config.group_rank == "two best" else 1)
            _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), config.groups_per_token)
            open_ = jnp.any(chosen[..., None] == jnp.arange(config.groups), axis=-2)
            scores = rearrange(jnp.where(open_[..., None], grouped, -jnp.inf), "b t g x -> b t (g x)")
        return jax.lax.top_k(scores, config.experts_per_token)[1]

    def chosen(self, x: Float[Array, "B T E"], routed: Float[Array, "B T E"] | None = None) -> Float[Array, "B T E"]:
        """What the chosen experts make of the tokens; the router reads `routed` where that is something else."""
        logits = self.logits(x if routed is None else routed)
        experts, shares = self.route(logits)
        biases = (None if bias is None else bias[...] for bias in (self.up_bias, self.down_bias))
        weights = ExpertWeights(self.up[...], self.down[...], *biases)
        y = sum_on_mesh(weights, _projected(x, self.latent_in, self.latent_in_bias), experts, shares, self.config)
        y = _projected(y, self.latent_out, self.latent_out_bias)
        if self.report is not None:
            y = with_report(y, self.report[...], logits, experts)
        if self.config.balance_loss or self.config.z_loss:
            total = self.routing_total or max(1, math.prod(x.shape[:-1]))
            y = with_routing_losses(y, logits, experts, self.config, total)
        return y


def _projected(x: Float[Array, "B T E"], weight: nnx.Param | None, bias: nnx.Param | None) -> Float[Array, "B T L"]:
    """`x` through a projection between tokens and the latents that experts read; itself where there is none."""
    if weight is None:
        return x
    y = product("bte,el->btl", x, weight[...])
    return y if bias is None else y + bias[...].astype(y.dtype)
