"""Rows that are sorted by expert, through the experts' MLPs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from streamjax.models.config import ExpertsConfig
from streamjax.models.mlps.dense import ACTIVATIONS
from streamjax.models.mlps.grouped_product import grouped_product
from streamjax.models.quantisation import QuantisedWeight


class ExpertWeights(NamedTuple):
    """The arrays of X experts of width F over E channels: G up projections, of two side by side the gate is first."""

    up: Float[Array, "X E G F"] | QuantisedWeight
    down: Float[Array, "X F E"] | QuantisedWeight
    up_bias: Float[Array, "X G F"] | None = None
    down_bias: Float[Array, "X E"] | None = None

    def dequantised(self, dtype: jnp.dtype) -> ExpertWeights:
        """With plain weights, of a dtype, in the place of quantised ones."""
        return ExpertWeights._make(x.astype(dtype) if isinstance(x, QuantisedWeight) else x for x in self)


def sorted_mlp(
    weights: ExpertWeights,
    rows: Float[Array, "N E"],
    experts: Int32[Array, " N"],
    sizes: Int32[Array, " X"],
    config: ExpertsConfig,
) -> Float[Array, "N E"]:
    """Each row through its expert.

    Args:
      weights: of X experts.
      rows: sorted by expert.
      experts: of each row.
      sizes: rows of each expert. Those behind the last one's count for nothing.
      config: how an expert computes.
    """
    hidden = grouped_product(rows, weights.up, sizes)
    if weights.up_bias is not None:
        hidden = hidden + weights.up_bias.astype(hidden.dtype)[experts]
    out = grouped_product(_activated(hidden, config), weights.down, sizes)
    return out if weights.down_bias is None else out + weights.down_bias.astype(out.dtype)[experts]


def sum_of_choices(
    weights: ExpertWeights,
    tokens: Float[Array, "N E"],
    experts: Int32[Array, "N A"],
    shares: Float[Array, "N A"],
    config: ExpertsConfig,
) -> Float[Array, "N E"]:
    """What the chosen experts make of each token, summed with their shares, on one device that has all experts."""
    each, chosen = shares.shape[1], experts.reshape(-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=config.num_experts).astype(jnp.int32)
    rows = tokens[order // each]
    if config.weighted == "inputs":
        rows, shares = (rows * shares.reshape(-1)[order, None]).astype(rows.dtype), jnp.ones_like(shares)
    out = sorted_mlp(weights, rows, chosen[order], sizes, config)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)
    out = out[place].reshape(*shares.shape, -1)
    return jnp.einsum("nae,na->ne", out, shares, preferred_element_type=shares.dtype).astype(tokens.dtype)


def _activated(hidden: Float[Array, "N G F"], config: ExpertsConfig) -> Float[Array, "N F"]:
    if not config.gated:
        return ACTIVATIONS[config.activation](hidden[:, 0])
    gate, up, limit = hidden[:, 0], hidden[:, 1], config.swiglu_limit
    if limit is None:
        return ACTIVATIONS[config.activation](gate) * up
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(config.swiglu_alpha * gate)
