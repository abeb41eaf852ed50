"""Partial attention results and the one way to combine them.

Softmax attention over a set of keys is a sum over any split of that set: each part contributes its own softmax output
and the log-sum-exp of its logits, and parts combine exactly (the associative merge of online softmax, Milakov and
Gimelshein 1805.02867; used for split-K decoding in Flash-Decoding and Lean Attention 2405.10480).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


def accumulator(dtype: Any) -> jnp.dtype:
    """The dtype in which sums over values of `dtype` are taken: float32, or float64 for float64 values."""
    return jnp.promote_types(dtype, jnp.float32)


class Partial(NamedTuple):
    """Attention over a part of the context.

    out: the part's softmax output, float32 [B, C, H, D]; zero where nothing was attended.
    lse: log-sum-exp of the part's logits, float32 [B, C, H]; -inf where nothing was attended.
    """

    out: Float[Array, "B C H D"]
    lse: Float[Array, "B C H"]


ATTENTION_OUTPUT = "attention_output"  # a policy of `jax.checkpoint` can ask for it


def named(part: tuple[Array, Array]) -> Partial:
    """What the forward pass of a `custom_vjp` found, so that `jax.checkpoint` can keep it by its name.

    Then a backward pass that computes a layer again leaves its attention out: gradients need `out` and `lse` alone.
    """
    return Partial(*(checkpoint_name(x, ATTENTION_OUTPUT) for x in part))


def merge(*parts: Partial) -> Partial:
    """Combine partials over disjoint sets of keys into the partial over their union, exactly.

    A part that attended nothing (lse = -inf) changes neither value nor gradient. Parts must agree in shape.
    """
    if not parts:
        raise ValueError("merge needs at least one Partial")
    if len(parts) == 1:
        return parts[0]
    lse = jnp.stack([part.lse for part in parts])  # one array: a smaller program than the parts one by one
    top = jnp.max(lse, axis=0)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))  # it cancels out
    weights = jnp.exp(lse - top)
    total = jnp.sum(weights, axis=0)
    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    shares = (weights / divisor)[..., None]
    out = sum((part.out * share for part, share in zip(parts[1:], shares[1:], strict=True)), parts[0].out * shares[0])
    return Partial(out, jnp.where(some, top + jnp.log(divisor), -jnp.inf))


def add_sink_logits(part: Partial, logits: Float[Array, " H"] | None) -> Partial:
    """`part` with one more logit a head in the softmax, which has no value: a learned attention sink.

    It is the merge with `Partial(out=0, lse=logits)`. Where nothing was attended the sink takes all the weight, and the
    output is 0. None: the part as it is.
    """
    if logits is None:
        return part
    logits = logits.astype(part.lse.dtype)
    out = part.out * jax.nn.sigmoid(part.lse - logits)[..., None]
    return Partial(out, jnp.logaddexp(part.lse, logits))


def merge_stacked(parts: Partial) -> Partial:
    """`merge` of N partials that lie along a leading axis: out [N, B, C, H, D], lse [N, B, C, H]."""
    if parts.lse.shape[0] == 1:
        return Partial(parts.out[0], parts.lse[0])
    top = jnp.max(parts.lse, axis=0)
    # It cancels out. A maximum's gradient asks which entry is equal to it, and compilers round the two differently.
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
    weights = jnp.exp(parts.lse - top)
    total = jnp.sum(weights, axis=0)
    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    out = jnp.sum(parts.out * (weights / divisor)[..., None], axis=0)
    return Partial(out, jnp.where(some, top + jnp.log(divisor), -jnp.inf))
