"""What losses read of logits that are never written: see `pallas_kernels.api`."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import argument_checks
from pallas_kernels.api.platforms import Implementation, find
from pallas_kernels.flash_call import no_gradient
from pallas_kernels.tpu import token_stats as tpu_token_stats

_KERNELS = {"tpu": tpu_token_stats}  # modules, with a function for each pass
_WHAT = "kernel for losses"


class LogitStats(NamedTuple):
    """What is kept of the logits of each token, natural units: the target's logit, the log-sum-exp, the mean."""

    logit: Float[Array, " N"]
    lse: Float[Array, " N"]
    mean: Float[Array, " N"]


def token_stats(
    x: Float[Array, "N E"],
    w: Float[Array, "V E"] | Float[Array, "E V"],
    targets: Int32[Array, " N"],
    *,
    vocab_axis: int = 0,
    softcap: float | None = None,
    block: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> LogitStats:
    """Of the logits `x @ w`: each token's target's, their log-sum-exp and their mean; float32.

    Enough for cross-entropy with label smoothing and z-loss, DPO and GRPO. The logits exist a block at a time, never in
    main memory (as in Cut Cross-Entropy, 2411.09009); backwards they are made again, four products in all for XLA's
    three. Differentiable in x and w: the gradient of w is summed in float32.

    Args:
      x: hidden states of tokens, behind the last norm; bfloat16 or float32.
      w: the output matrix, of x's dtype.
      targets: ids; for one that is not in the vocabulary the logit is 0.
      vocab_axis: which dimension of w is the vocabulary.
      softcap: logits become `softcap * tanh(logits / softcap)`.
      block: entries of the vocabulary that are worked on at once, a multiple of 128; by default by the shapes.
      implementation, interpret: see `flash_attention`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    argument_checks.token_stats(x, w, targets, vocab_axis, block)
    settings = {"vocab_axis": vocab_axis, "softcap": softcap, "block": block, "interpret": interpret}
    return _differentiable(find(_KERNELS, _WHAT, implementation), tuple(settings.items()), x, w, targets)


def token_stats_gradients(
    x: Float[Array, "N E"],
    w: Float[Array, "V E"] | Float[Array, "E V"],
    targets: Int32[Array, " N"],
    lse: Float[Array, " N"],
    slopes: LogitStats,
    d_w: Float[Array, "V E"] | Float[Array, "E V"] | None,
    *,
    vocab_axis: int = 0,
    softcap: float | None = None,
    block: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "N E"], Float[Array, "V E"] | Float[Array, "E V"] | None]:
    """The backward pass of `token_stats`: float32 gradient of x, and `d_w` with these tokens' part added in place.

    Args:
      x, w, targets, vocab_axis, softcap, block, implementation, interpret: as there.
      lse: what `token_stats` returned.
      slopes: of a loss, along the statistics.
      d_w: the gradient of w so far, of any float dtype; None where it is not wanted, which saves a product.

    Raises:
      ValueError: as there.
    """
    argument_checks.token_stats(x, w, targets, vocab_axis, block)
    kernels = find(_KERNELS, _WHAT, implementation)
    if d_w is not None and d_w.shape != w.shape:
        raise ValueError(f"d_w {d_w.shape}: use the shape of w, {w.shape}")
    d_x, d_w = kernels.token_stats_gradients(
        x, w, targets, lse, slopes, d_w, vocab_axis=vocab_axis, softcap=softcap, block=block, interpret=interpret
    )
    return d_x, d_w


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(
    kernels: ModuleType, settings: tuple[tuple[str, Any], ...], x: Array, w: Array, targets: Array
) -> LogitStats:
    return LogitStats(*kernels.token_stats(x, w, targets, **dict(settings)))


def _forward(kernels: Any, settings: Any, x: Array, w: Array, targets: Array) -> tuple[LogitStats, Any]:
    stats = _differentiable(kernels, settings, x, w, targets)
    return stats, (x, w, targets, stats.lse)


def _backward(kernels: Any, settings: Any, kept: Any, slopes: LogitStats) -> tuple[Array, Array, Any]:
    x, w, targets, lse = kept
    zeros = jnp.zeros(w.shape, jnp.float32)
    d_x, d_w = kernels.token_stats_gradients(x, w, targets, lse, slopes, zeros, **dict(settings))
    return d_x.astype(x.dtype), d_w.astype(w.dtype), no_gradient(targets)


_differentiable.defvjp(_forward, _backward)
