"""Attention with every logit in memory: the reference, and the fast way for few queries or short sequences."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import Partial, accumulator

FEW_QUERIES = 32  # queries of one key head up to which the product is taken from the keys' side


def attend(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    visible: Bool[Array, "#B #K #C S"] | Bool[Array, "#B #K #G #C S"] | Bool[Array, "#B #K #G #C #N #M"],
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    distance: Float[Array, "#B #K #C S"] | None = None,
) -> Partial:
    """Softmax attention of C queries over S keys, as a Partial; H must be a multiple of K (grouped queries).

    Args:
      q, k, v: already rotated, any float dtype; dot products accumulate in float32.
      visible: which keys count, for each row, key head and query, broadcast where a size is 1; or for each query head;
        or for each query head and N runs of M keys, where all of a run often share what is said of them.
      scale: factor on the logits.
      softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2), before masking.
      slopes, distance: ALiBi (2108.12409): `-slope * distance` is added to the scaled logits of each head.
    """
    return attend_weighted(q, k, v, visible, scale=scale, softcap=softcap, slopes=slopes, distance=distance)[0]


def attend_weighted(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    visible: Bool[Array, "#B #K #C S"] | Bool[Array, "#B #K #G #C S"] | Bool[Array, "#B #K #G #C #N #M"],
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    distance: Float[Array, "#B #K #C S"] | None = None,
) -> tuple[Partial, Float[Array, "B K G C S"], Float[Array, "B K G C 1"]]:
    """`attend`, the exponentials that it summed, and the logit of each query above which they are."""
    dtype = accumulator(q.dtype)
    logits = _logits(q, k, visible, scale, softcap, slopes, distance)
    keys = tuple(range(4, logits.ndim))
    top = jax.lax.stop_gradient(jnp.max(logits, axis=keys, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=keys, keepdims=True)
    weights, top, total = (x.reshape(*x.shape[:4], math.prod(x.shape[4:])) for x in (weights, top, total))
    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    out = jnp.einsum("bkgcs,bksd->bkgcd", weights.astype(v.dtype), v, preferred_element_type=dtype) / divisor
    lse = jnp.where(some, top + jnp.log(divisor), -jnp.inf)[..., 0]
    part = Partial(rearrange(out, "b k g c d -> b c (k g) d"), rearrange(lse, "b k g c -> b c (k g)"))
    return part, weights, top


def attention_shares(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K S D"],
    lse: Float[Array, "B C H"],
    visible: Bool[Array, "#B #K #C S"] | Bool[Array, "#B #K #G #C S"],
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    distance: Float[Array, "#B #K #C S"] | None = None,
) -> Float[Array, "B K G C S"]:
    """How much of its attention each query gives to each key.

    `lse` is of all that the queries attend to, these keys among it; the other arguments are those of `attend`.
    """
    logits = _logits(q, k, visible, scale, softcap, slopes, distance)
    whole = rearrange(lse, "b c (k g) -> b k g c 1", k=k.shape[1])
    return jnp.exp(logits - jnp.where(jnp.isneginf(whole), 0.0, whole))


def summed_over_queries(
    shares: Float[Array, "B K G C S"], factor: Float[Array, "B K G C"] | None = None
) -> Float[Array, "B H S"]:
    """How much attention each key gets from each query head; each query's share times its `factor`."""

    def by_product(shares: Array, factor: Array) -> Array:
        """The CPU compiler makes a slow loop of a sum over an axis in the middle."""
        return jnp.einsum("bkgcs,bkgc->bkgs", shares, factor, precision="highest")

    def by_sum(shares: Array, factor: Array) -> Array:
        return jnp.sum(shares * factor[..., None], axis=3)

    if factor is None:
        factor = jnp.ones(shares.shape[:4], shares.dtype)
    found = jax.lax.platform_dependent(shares, factor, cpu=by_product, default=by_sum)
    return rearrange(found, "b k g s -> b (k g) s")


def _logits(
    q: Array,
    k: Array,
    visible: Array,
    scale: float,
    softcap: float | None,
    slopes: Array | None,
    distance: Array | None,
) -> Float[Array, "B K G C *S"]:
    """Every logit; -inf where a key does not count. Keys lie in runs where `visible` says so."""
    dtype = accumulator(q.dtype)
    grouped = rearrange(q, "b c (k g) d -> b k g c d", k=k.shape[1])
    if grouped.shape[2] * grouped.shape[3] <= FEW_QUERIES:
        # Keys on the left: the CPU compiler would transpose the keys otherwise, more work than the product itself.
        few = rearrange(grouped, "b k g c d -> b k (g c) d")
        logits = jnp.einsum("bksd,bknd->bksn", k, few, preferred_element_type=dtype)
        logits = rearrange(logits, "b k s (g c) -> b k g c s", g=grouped.shape[2]) * scale
    else:
        # One axis of rows: with two the CPU compiler lays keys down transposed before the product.
        rows = rearrange(grouped, "b k g c d -> b k (g c) d")
        logits = jnp.einsum("bknd,bksd->bkns", rows, k, preferred_element_type=dtype) * scale
        logits = rearrange(logits, "b k (g c) s -> b k g c s", g=grouped.shape[2])
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if slopes is not None:
        assert distance is not None, "ALiBi needs distances"
        logits -= rearrange(slopes, "(k g) -> k g 1 1", k=k.shape[1]) * distance[:, :, None]
    if visible.ndim == 6:
        run = visible.shape[5]
        logits = logits.reshape(*logits.shape[:4], logits.shape[4] // run, run)
    return jnp.where(visible if visible.ndim > 4 else visible[:, :, None], logits, -jnp.inf)
