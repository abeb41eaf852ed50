"""What the kernels compute, plainly: every logit in memory, in the dtype of the arguments (float64 in the tests)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from pallas_kernels.partial import Partial
from pallas_kernels.patterns import Pattern


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    pattern: Pattern,
    *,
    scale: float,
    segment_ids: tuple[Int32[Array, "B T"], Int32[Array, "B S"]] | None = None,
    offset: Int[Array, ""] | int = 0,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    sink_logits: Float[Array, " H"] | None = None,
) -> Partial:
    """See `pallas_kernels.api.flash_attention`."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    query = offset + jnp.arange(q.shape[1])[:, None]
    key = jnp.arange(k.shape[1])[None]
    logits = scale * jnp.einsum("bthd,bshd->bhts", q, k)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if slopes is not None:
        logits -= slopes[:, None, None] * (query - key)
    seen = pattern.mask(query, key)[None]
    if segment_ids is not None:
        seen = seen & (segment_ids[0][:, :, None] == segment_ids[1][:, None])
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    if sink_logits is not None:  # one more key, whose value is 0
        column = jnp.broadcast_to(sink_logits[:, None, None].astype(logits.dtype), (*logits.shape[:-1], 1))
        logits, v = jnp.concatenate((logits, column), axis=-1), jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0)))
    weights, lse = _softmax(logits)
    return Partial(jnp.einsum("bhts,bshd->bthd", weights, v), lse)


def decode_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    count: Int32[Array, " B"],
    *,
    scale: float,
    first: Int32[Array, " B"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Partial:
    """See `pallas_kernels.api.decode_attention`; of numbers that are not quantised."""
    seen = _held(k.shape[2], count, first)[:, None]
    if window is not None:
        query = count[:, None] + jnp.arange(q.shape[1])
        seen = seen & (_age(k.shape[2], count, first)[:, None] >= query[:, :, None] - window)
    return _attend(q, k, v, seen[:, None], scale, softcap)


def paged_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    pages: Int32[Array, "B K N"],
    count: Int32[Array, " B"],
    *,
    page_size: int,
    scale: float,
    first: Int32[Array, " B"] | None = None,
    softcap: float | None = None,
) -> Partial:
    """See `pallas_kernels.api.paged_attention`."""
    page = jnp.arange(k.shape[2]) // page_size
    chosen = (page[None, None, :, None] == pages[:, :, None]).any(axis=-1)
    chosen = jnp.repeat(chosen & _held(k.shape[2], count, first)[:, None], q.shape[2] // k.shape[1], axis=1)
    return _attend(q, k, v, chosen[:, :, None], scale, softcap)


def page_scores(
    q: Float[Array, "B C H D"],
    summary: Float[Array, "B K P W"],
    some: Bool[Array, "B K P parts"] | None = None,
    *,
    bounds: bool = False,
    parts: int = 1,
) -> Float[Array, "B H C P"]:
    """See `pallas_kernels.api.page_scores`."""
    batch, key_heads, pages, _ = summary.shape
    group = q.shape[2] // key_heads
    kept = jnp.repeat(summary.reshape(batch, key_heads, pages, parts, -1, q.shape[3]), group, axis=1)
    products = jnp.einsum("bchd,bhpnsd->bhcpnsd", q, kept)
    found = jnp.sum(jnp.max(products, axis=-2) if bounds else products[..., 0, :], axis=-1)
    if some is not None:
        found = jnp.where(jnp.repeat(some, group, axis=1)[:, :, None], found, -jnp.inf)
    return jnp.max(found, axis=-1)


def hsa_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K P S D"],
    v: Float[Array, "B K P S D"],
    chosen: Int32[Array, "B K C N"],
    weights: Float[Array, "B K C N"],
    *,
    scale: float,
) -> Float[Array, "B C H D"]:
    """See `pallas_kernels.api.hsa_attention`."""
    group = q.shape[2] // k.shape[1]
    k, v, chosen, weights = (jnp.repeat(x, group, axis=1) for x in (k, v, chosen, weights))
    inside, _ = _softmax(scale * jnp.einsum("bchd,bhpsd->bhpcs", q, k).reshape(*k.shape[:2], -1, k.shape[3]))
    inside = inside.reshape(*k.shape[:3], q.shape[1], k.shape[3])
    given = jnp.einsum("bhcn,bhcnp->bhpc", weights, chosen[..., None] == jnp.arange(k.shape[2]))
    return jnp.einsum("bhpc,bhpcs,bhpsd->bchd", given, inside, v)


def token_stats(
    x: Float[Array, "N E"],
    w: Float[Array, "V E"] | Float[Array, "E V"],
    targets: Int32[Array, " N"],
    *,
    vocab_axis: int = 0,
    softcap: float | None = None,
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """See `pallas_kernels.api.token_stats`."""
    logits = x @ (w.T if vocab_axis == 0 else w)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    hit = jnp.arange(logits.shape[1]) == targets[:, None]
    top = jax.lax.stop_gradient(jnp.max(logits, axis=1))
    lse = top + jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=1))
    return jnp.sum(jnp.where(hit, logits, 0.0), axis=1), lse, jnp.mean(logits, axis=1)


def delta_update(
    q: Float[Array, "B G K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B G R V"],
    decay: Float[Array, "B G R K"],
    beta: Float[Array, "B G R"],
    state: Float[Array, "B G R K V"],
) -> tuple[Float[Array, "B G R V"], Float[Array, "B G R K V"]]:
    """See `pallas_kernels.api.delta_update`."""
    state, key = decay[..., None] * state, k[:, :, None, :, None]
    value = beta[..., None] * (v - jnp.sum(state * key, axis=-2))
    state = state + key * value[..., None, :]
    return jnp.sum(state * q[:, :, None, :, None], axis=-2), state


def chunkwise_recurrence(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G R V"],
    log_decay: Float[Array, "B T G R"] | Float[Array, "B T G R K"],
    state: Float[Array, "B G R K V"],
    *,
    beta: Float[Array, "B T G R"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T G R V"], Float[Array, "B G R K V"]]:
    """See `pallas_kernels.api.chunkwise_recurrence`; token by token."""
    decay = jnp.exp(log_decay if log_decay.ndim == 5 else log_decay[..., None])
    if resets is not None:
        decay = jnp.where(resets[:, :, None, None, None], 0.0, decay)
    decay = jnp.broadcast_to(decay, (*v.shape[:-1], q.shape[-1]))

    def token(state: Array, given: tuple) -> tuple[Array, Array]:
        q, k, v, decay, beta = given
        if beta is None:
            state = decay[..., None] * state + k[:, :, None, :, None] * v[..., None, :]
            return state, jnp.sum(state * q[:, :, None, :, None], axis=-2)
        out, state = delta_update(q, k, v, decay, beta, state)
        return state, out

    given = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, decay, beta))
    state, out = jax.lax.scan(token, state, given)
    return jnp.moveaxis(out, 0, 1), state


def pool_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "K P S D"],
    v: Float[Array, "K P S D"],
    pages: Int32[Array, "B N"],
    count: Int32[Array, " B"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """See `pallas_kernels.api.pool_attention`."""
    k, v = (jnp.swapaxes(x[:, jnp.maximum(pages, 0)], 0, 1).reshape(len(q), len(x), -1, x.shape[3]) for x in (k, v))
    seen = jnp.arange(k.shape[2]) < count[:, None]
    return _attend(q, k, v, seen[:, None, None], scale, softcap)


def shared_pool_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "K P S D"],
    v: Float[Array, "K P S D"],
    pages: Int32[Array, " M"],
    readers: Bool[Array, "M B"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """See `pallas_kernels.api.shared_pool_attention`."""
    k, v = (x[:, jnp.maximum(pages, 0)].reshape(1, len(x), -1, x.shape[3]) for x in (k, v))
    k, v = (jnp.broadcast_to(x, (len(q), *x.shape[1:])) for x in (k, v))
    seen = jnp.repeat((readers & (pages >= 0)[:, None]).T, k.shape[2] // len(pages), axis=1)
    return _attend(q, k, v, seen[:, None, None], scale, softcap)


def _age(slots: int, count: Int32[Array, " B"], first: Int32[Array, " B"] | None) -> Int[Array, "B S"]:
    """Of the token in each slot of a ring: how many came before it."""
    start = jnp.zeros_like(count) if first is None else first
    return (jnp.arange(slots)[None] - start[:, None]) % slots


def _held(slots: int, count: Int32[Array, " B"], first: Int32[Array, " B"] | None) -> Bool[Array, "B S"]:
    return _age(slots, count, first) < count[:, None]


def _attend(
    q: Array, k: Array, v: Array, seen: Bool[Array, "B #H #C S"], scale: float, softcap: float | None
) -> Partial:
    """Attention of queries [B, C, H, D] over slots [B, K, S, D]."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
    logits = scale * jnp.einsum("bchd,bhsd->bhcs", q, k)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    weights, lse = _softmax(jnp.where(seen, logits, -jnp.inf))
    return Partial(jnp.einsum("bhcs,bhsd->bchd", weights, v), lse)


def _softmax(logits: Float[Array, "B H T S"]) -> tuple[Float[Array, "B H T S"], Float[Array, "B T H"]]:
    """Weights, and the log-sum-exp; 0 and -inf where there is nothing."""
    # It cancels out. A maximum's gradient asks which logit is equal to it, and compilers round the two differently:
    # where none is, the gradient is NaN.
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    lse = jnp.where(some, top + jnp.log(divisor), -jnp.inf)[..., 0]
    return weights / divisor, jnp.swapaxes(lse, 1, 2)
