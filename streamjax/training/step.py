"""One training step, one evaluation step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float

from streamjax.models.decoder import Decoder
from streamjax.training.backprop import Batch, check_method, loss_sum
from streamjax.training.state import TrainState

Metrics = dict[str, Array]


def accumulate_gradients(
    model: Decoder, batch: Batch, microbatches: int, method: str = "full", *, logits_chunk: int | None = None
) -> tuple[Float[Array, ""], Decoder]:
    """`loss_and_grad` of a batch, cut into microbatches that exist one at a time.

    Sums are accumulated and divided by the batch's total weight at the end, so that the result is that of the whole
    batch however the weights fall. Rows are dealt out in turn: under a mesh each device keeps its own.
    """
    total = jnp.sum(batch["weights"].astype(jnp.float32))
    value_and_grad = jax.value_and_grad(partial(loss_sum, remat=method == "remat", logits_chunk=logits_chunk))
    if microbatches == 1:
        loss, grads = value_and_grad(model, dict(batch))
    else:
        cut = {name: rearrange(x, "(b n) t -> n b t", n=microbatches) for name, x in batch.items()}

        def add(sums: tuple[Array, Decoder], part: Batch) -> tuple[tuple[Array, Decoder], None]:
            return jax.tree.map(jnp.add, sums, value_and_grad(model, part)), None

        zero = jax.tree.map(jnp.zeros_like, model)
        (loss, grads), _ = jax.lax.scan(add, (jnp.float32(0.0), zero), cut)
    scale = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    return loss * scale, jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def make_train_step(
    optimizer: optax.GradientTransformation,
    *,
    method: str = "full",
    accumulation: int = 1,
    logits_chunk: int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted `(state, batch) -> (state, metrics)`; the state is donated.

    Metrics are the loss in nats per token and the global norm of the gradient before clipping, float32 scalars.
    """
    check_method(method)

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = accumulate_gradients(state.model, batch, accumulation, method, logits_chunk=logits_chunk)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return dataclasses.replace(state, model=model, opt_state=opt_state, step=state.step + 1), metrics

    return train_step


@jax.jit
def eval_step(model: Decoder, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of negative log-likelihoods in nats, and the sum of the weights."""
    return loss_sum(model, batch), jnp.sum(batch["weights"].astype(jnp.float32))
