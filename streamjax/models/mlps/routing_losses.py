"""Losses that keep a router's choices even and its logits small, added to the gradient where the router is.

A model's loss is computed far from its routers, and in chunked backprop at another time. So nothing is added to the
loss: an identity on what the experts return adds the losses' gradient when the backward pass comes by, as Megatron does
it. A token counts if its cotangent is not zero: padding, and tokens on which the loss does not depend, do not.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from streamjax.models.config import ExpertsConfig


def balance_loss(
    logits: Float[Array, "B T X"], experts: Int[Array, "B T A"], counted: Bool[Array, "B T"], total: int
) -> Float[Array, ""]:
    """The Switch Transformer's loss (2101.03961): 1 where all experts get the same.

    X times the sum, over experts, of their share of the choices of the tokens that are counted and the mean of their
    probabilities, which is a sum over the tokens divided by `total`.
    """
    count = logits.shape[-1]
    choices = jnp.broadcast_to(counted[..., None], experts.shape).astype(logits.dtype)
    share = jnp.zeros(count, logits.dtype).at[experts].add(choices) / jnp.maximum(1, jnp.sum(choices))
    probability = jnp.sum(jax.nn.softmax(logits, axis=-1) * counted[..., None], axis=(0, 1))
    return count * jnp.sum(jax.lax.stop_gradient(share) * probability) / total


def z_loss(logits: Float[Array, "B T X"], counted: Bool[Array, "B T"], total: int) -> Float[Array, ""]:
    """The router's z-loss (2202.08906): squared log-sum-exp of the logits, a sum over tokens divided by `total`."""
    return jnp.sum(counted * jax.nn.logsumexp(logits, axis=-1) ** 2) / total


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def with_routing_losses(
    y: Float[Array, "B T E"],
    logits: Float[Array, "B T X"],
    experts: Int[Array, "B T A"],
    config: ExpertsConfig,
    total: int,
) -> Float[Array, "B T E"]:
    """`y`; the gradient of `logits` gets that of the losses, times their coefficients.

    Args:
      y: what the experts return.
      logits: the router's.
      experts: each token's.
      config: has the coefficients.
      total: tokens that the losses are means over: those of the whole batch.
    """
    return y


def _forward(
    y: Array, logits: Array, experts: Array, config: ExpertsConfig, total: int
) -> tuple[Array, tuple[Array, Array]]:
    return y, (logits, experts)


def _backward(
    config: ExpertsConfig, total: int, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array, None]:
    logits, experts = saved
    counted = jnp.any(cotangent != 0, axis=-1)

    def losses(logits: Array) -> Array:
        balance = balance_loss(logits, experts, counted, total)
        return config.balance_loss * balance + config.z_loss * z_loss(logits, counted, total)

    return cotangent, jax.grad(losses)(logits), None


with_routing_losses.defvjp(_forward, _backward)
