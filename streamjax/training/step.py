"""One training step, one evaluation step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float

from streamjax.models.decoder import Decoder
from streamjax.training.backprop import Batch, check_method, loss_and_grad, loss_sum
from streamjax.training.state import TrainState

Metrics = dict[str, Array]


def accumulate_gradients(
    model: Decoder, batch: Batch, microbatches: int, **options: Any
) -> tuple[Float[Array, ""], Decoder]:
    """`loss_and_grad` of a batch, cut into microbatches that exist one at a time.

    Each microbatch counts as its share of the batch's weight, so that the result is that of the whole batch however
    the weights fall. Rows are dealt out in turn: under a mesh each device keeps its own.

    Args:
      model: the model.
      batch: as for `loss_and_grad`.
      microbatches: how many; they must divide the rows.
      options: the other arguments of `loss_and_grad`, `method` and so on.
    """
    if microbatches == 1:
        return loss_and_grad(model, dict(batch), **_known(options))
    total = jnp.sum(batch["weights"].astype(jnp.float32))
    cut = {name: rearrange(x, "(b n) t -> n b t", n=microbatches) for name, x in batch.items()}

    def add(sums: tuple[Array, Decoder], part: Batch) -> tuple[tuple[Array, Decoder], None]:
        weight = jnp.sum(part["weights"].astype(jnp.float32))
        share = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1.0), 0.0)
        found = loss_and_grad(model, part, **_known(options))
        return jax.tree.map(lambda x, y: x + y * share.astype(y.dtype), sums, found), None

    zero = jax.tree.map(jnp.zeros_like, model)
    (loss, grads), _ = jax.lax.scan(add, (jnp.float32(0.0), zero), cut)
    return loss, grads


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that `loss_and_grad` has: "full" and "remat" cut and move nothing."""
    return {name: value for name, value in options.items() if name in ("method", "logits_chunk")}


def make_train_step(
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    **options: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted `(state, batch) -> (state, metrics)`; the state is donated.

    Metrics are the loss in nats per token and the global norm of the gradient before clipping, float32 scalars.

    Args:
      optimizer: turns gradients into updates.
      accumulation: microbatches a step.
      options: how `loss_and_grad` makes the gradient: its `method` and so on.

    Raises:
      ValueError: an unknown method.
    """
    check_method(options.get("method", "full"))

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = accumulate_gradients(state.model, batch, accumulation, **options)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return dataclasses.replace(state, model=model, opt_state=opt_state, step=state.step + 1), metrics

    return train_step


@jax.jit
def eval_step(model: Decoder, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of negative log-likelihoods in nats, and the sum of the weights."""
    return loss_sum(model, batch), jnp.sum(batch["weights"].astype(jnp.float32))
