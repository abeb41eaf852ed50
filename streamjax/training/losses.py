"""Next-token cross-entropy without full logits.

Logits of a whole sequence are B x T x V float32 values, more than everything else in a training step when V is large.
Here they exist for one chunk of the sequence at a time, forwards and backwards (a checkpointed scan over chunks), the
idea of chunked losses as in 2410.10989 (Liger) in plain JAX.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from streamjax.models.decoder import Decoder

LOGITS_PER_CHUNK = 1 << 26  # float32 logits that may exist at once: 256 MiB


def token_nll(logits: Float[Array, "B C V"], targets: Int32[Array, "B C"]) -> Float[Array, "B C"]:
    """Negative log-likelihood of each target, in nats, float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def chunked_loss(
    model: Decoder,
    hidden: Float[Array, "B T E"],
    targets: Int32[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    """Weighted sum of the tokens' negative log-likelihoods, in nats, float32.

    Args:
      model: its output layer makes the logits.
      hidden: hidden states after the last norm.
      targets: the token to predict at each place.
      weights: how much each token counts; a token of weight 0 has no influence, whatever its target.
      chunk_size: tokens of a row whose logits exist at once; by default as many as `LOGITS_PER_CHUNK` allows.
    """
    batch, length, _ = hidden.shape
    if chunk_size is None:
        chunk_size = max(1, LOGITS_PER_CHUNK // (batch * model.config.vocab_size))
    chunk_size = min(chunk_size, length)

    def part(hidden: Array, targets: Array, weights: Array) -> Array:
        nll = token_nll(model.logits(hidden), targets)
        return jnp.sum(jnp.where(weights == 0, 0.0, nll * weights.astype(jnp.float32)))

    if chunk_size == length:
        return part(hidden, targets, weights)
    chunks = math.ceil(length / chunk_size)
    pad = chunks * chunk_size - length

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return rearrange(padded, "b (n c) ... -> n b c ...", c=chunk_size)

    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + jax.checkpoint(part)(*chunk), None

    total, _ = jax.lax.scan(add, jnp.float32(0.0), (cut(hidden), cut(targets), cut(weights)))
    return total
