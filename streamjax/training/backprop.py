"""The loss of a batch and its gradient.

`method` says what the backward pass keeps: "full" keeps every activation, "remat" each layer's input only (gradient
checkpointing, 1604.06174). The gradients are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.models.decoder import Decoder
from streamjax.training.losses import chunked_loss

Batch = Mapping[str, Array]
Method = Literal["full", "remat"]
METHODS: tuple[str, ...] = get_args(Method)


def check_method(method: str) -> None:
    """Raise ValueError unless `method` is one that there is."""
    if method not in METHODS:
        raise ValueError(f"unknown backprop method {method!r}; use one of {', '.join(METHODS)}")


def loss_sum(model: Decoder, batch: Batch, *, remat: bool = False, logits_chunk: int | None = None) -> Float[Array, ""]:
    """Weighted sum of the negative log-likelihoods of a batch, in nats; see `loss_and_grad` for the arguments."""
    hidden = model.hidden(
        batch["tokens"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids"), remat=remat
    )
    return chunked_loss(model, hidden, batch["targets"], batch["weights"], chunk_size=logits_chunk)


@partial(jax.jit, static_argnames=("method", "logits_chunk"))
def loss_and_grad(
    model: Decoder, batch: Batch, method: str = "full", *, logits_chunk: int | None = None
) -> tuple[Float[Array, ""], Decoder]:
    """Mean loss of a batch, and its gradient.

    Args:
      model: the model.
      batch: tokens, targets int32 [B, T] and weights float32 [B, T]; segment_ids and positions int32 [B, T] if packed.
      method: "full" or "remat"; what is kept for the backward pass.
      logits_chunk: tokens of a row whose logits exist at once; None chooses.

    Returns:
      The weighted mean of the tokens' negative log-likelihoods in nats, float32, and the gradient, shaped as the model.
      Both are 0 where all weights are.

    Raises:
      ValueError: an unknown method, or a batch that lacks an array.
    """
    check_method(method)
    missing = [name for name in ("tokens", "targets", "weights") if name not in batch]
    if missing:
        raise ValueError(f"the batch has no {missing[0]!r}; it needs tokens, targets and weights, each [B, T]")
    total = jnp.sum(batch["weights"].astype(jnp.float32))
    scale = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)

    def mean(model: Decoder) -> Array:
        return loss_sum(model, batch, remat=method == "remat", logits_chunk=logits_chunk) * scale

    return jax.value_and_grad(mean)(model)
