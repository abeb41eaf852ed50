"""Recurrences over a matrix state, `S_t = decay_t * S_{t-1} + update_t`, read by queries: one core for all of them.

A head keeps a matrix S of K x V numbers, in place of keys and values. The update of a token is `k_t v_t^T`: gated
linear attention (2312.06635) and, with one decay a head, Mamba-2 (2405.21060). With a `beta` it is the delta rule
(2406.06484), `beta_t k_t (v_t - S_t'^T k_t)^T` with S' the decayed state: Gated DeltaNet (2412.06464), and with a decay
for each channel of a key Kimi Delta Attention (2510.26692). Its output is `S_t^T q_t`.

Tokens are read in blocks. Inside a block all pairs of tokens are scored at once, as attention does it; between blocks
the state is handed on. All decays are kept as logarithms at most 0, and only differences that are at most 0 become
exponentials, so nothing overflows however strong a decay is. With a delta rule what tokens of a block write depends on
what those before them wrote: a triangular system (the UT transform of 2406.06484, section 3.2), inverted for all blocks
at once. TPUs and GPUs have kernels: of one token, which reads and writes its state once, and of many, for which nothing
of a block is ever in main memory but what it begins with.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import api
from pallas_kernels.api import platforms
from pallas_kernels.partial import accumulator
from streamjax.attention.context.recurrence import context_recurrence
from streamjax.attention.sharded import context_shards, per_device_call
from streamjax.attention.triangular_inverse import unit_lower_inverse

BLOCK = 64  # tokens of a block with one decay a head,
CHANNEL_BLOCK = 16  # and with one a channel, whose pairs of tokens have K decays each
KERNEL_TOKENS = 64  # from which on kernels read blocks


def recurrence(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G R V"],
    log_decay: Float[Array, "B T G R"] | Float[Array, "B T G R K"],
    state: Float[Array, "B H K V"],
    *,
    beta: Float[Array, "B T G R"] | None = None,
    valid: Bool[Array, "B T"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    block: int | None = None,
    products: Any = None,
) -> tuple[Float[Array, "B T G R V"], Float[Array, "B H K V"]]:
    """Read T tokens: what each reads from the state that it has written to, and the state behind them.

    Args:
      q, k: queries and keys of G groups of heads.
      v: values; R heads share the queries and keys of a group, H = G R.
      log_decay: logarithm of a token's decay, at most 0; for a head, or for each channel of its key.
      state: in front of the tokens, in the dtype of sums (float32; float64 for float64).
      beta: how much of its value a token writes by the delta rule; None: the update adds to the state.
      valid: the tokens that count; the others change no state, and their outputs mean nothing. All where None.
      resets: the tokens that begin with an empty state, such as the first one of each document in a packed row.
      block: tokens of a block; by default what is fast, by XLA.
      products: the dtype that kernels for many tokens round queries, keys, values and what they multiply to: the
        model's. Sums and states are float32. By default that of v; XLA rounds nothing.

    Whole sequences (no `valid`) may lie over the mesh axis `context`; see `context.recurrence`.

    Returns:
      Outputs in the dtype of sums, and the new state. A row without valid tokens keeps its state bit for bit.
    """
    dtype, length, products = accumulator(v.dtype), v.shape[1], jnp.dtype(products or v.dtype)
    q, k, v, log_decay = (x.astype(dtype) for x in (q, k, v, log_decay))
    beta = None if beta is None else beta.astype(dtype)
    if valid is None and context_shards(length) > 1:
        return context_recurrence(partial(recurrence, products=products), q, k, v, log_decay, state, beta, resets)
    if valid is not None:
        log_decay = jnp.where(_beside(valid, log_decay), log_decay, 0.0)
        v = jnp.where(_beside(valid, v), v, 0.0)
        beta = None if beta is None else jnp.where(_beside(valid, beta), beta, 0.0)
    heads = rearrange(state, "b (g r) k v -> b g r k v", g=v.shape[2])
    if length == 1:
        first = None if resets is None else resets[:, 0]
        out, heads = _one_token(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], heads, beta, first)
    elif length >= KERNEL_TOKENS and block is None and platforms.takes_blocks(heads.shape, heads.dtype, products):
        out, heads = _blocks_by_kernel(products, q, k, v, log_decay, heads, beta, resets)
    else:
        channels = log_decay.ndim == 5
        size = min(block or (CHANNEL_BLOCK if channels else BLOCK), length)
        blocks = _cut(q, k, v, log_decay, beta, resets, size)
        out, heads = _read_blocks(blocks, heads)
        out = rearrange(out, "n b g r c v -> b (n c) g r v")[:, :length]
    new = rearrange(heads, "b g r k v -> b (g r) k v").astype(state.dtype)
    return out, new if valid is None else jnp.where(jnp.any(valid, axis=1)[:, None, None, None], new, state)


def _beside(mask: Bool[Array, "B T"], x: Array) -> Array:
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))


def _one_token(
    q: Float[Array, "B G K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B G R V"],
    log_decay: Array,
    state: Float[Array, "B G R K V"],
    beta: Float[Array, "B 1 G R"] | None,
    reset: Bool[Array, " B"] | None,
) -> tuple[Float[Array, "B 1 G R V"], Float[Array, "B G R K V"]]:
    """The recurrence itself, and on TPUs and GPUs each state read once and written once.

    With the delta rule that takes a kernel. Without, the output is the new state's sum over its rows: compilers there
    make one pass of it and the update. Elsewhere what the old state gives to query and key is read together, as a
    product, before it is written.
    """
    decay = jnp.exp(log_decay)
    decay = decay[..., None] if decay.ndim == 3 else decay  # of each channel of the key, or of all
    if reset is not None:
        decay = jnp.where(reset[:, None, None, None], 0.0, decay)
    if beta is not None and platforms.takes_states(state.shape[-2], state.shape[-1], state.dtype.name):
        return _by_kernel(q, k, v, decay, beta[:, 0], state)
    if beta is None and platforms.platform_implementation() is not None:
        state = decay[..., None] * state + k[:, :, None, :, None] * v[:, :, :, None]
        return jnp.sum(state * q[:, :, None, :, None], axis=-2)[:, None], state
    pair = jnp.stack((q, k), axis=2)[:, :, None] * decay[:, :, :, None]  # [B, G, R, 2, K]
    read = jnp.einsum("bgrmk,bgrkv->bgrmv", pair, state)
    if beta is not None:
        v = beta[:, 0, ..., None] * (v - read[:, :, :, 1])
    out = read[:, :, :, 0] + jnp.sum(q * k, axis=-1)[:, :, None, None] * v
    return out[:, None], decay[..., None] * state + k[:, :, None, :, None] * v[:, :, :, None]


def _by_kernel(
    q: Array, k: Array, v: Array, decay: Array, beta: Array, state: Array
) -> tuple[Float[Array, "B 1 G R V"], Float[Array, "B G R K V"]]:
    """A token of the delta rule by `api.delta_update`, each device's own rows and groups of heads."""
    pair, heads = ("batch", "kv_heads", None), ("batch", "kv_heads", None, None)
    names = pair, pair, heads, heads, pair, (*heads, None)
    decay = jnp.broadcast_to(decay, (*v.shape[:-1], q.shape[-1]))
    out, state = per_device_call(api.delta_update, names, (heads, names[-1]), (q, k, v, decay, beta, state))
    return out[:, None], state


def _blocks_by_kernel(
    products: Any, q: Array, k: Array, v: Array, log_decay: Array, state: Array, beta: Any, resets: Any
) -> tuple[Float[Array, "B T G R V"], Float[Array, "B G R K V"]]:
    """Many tokens by `api.chunkwise_recurrence`, each device's own rows and groups of heads."""

    def own(
        q: Array, k: Array, v: Array, log_decay: Array, state: Array, beta: Any, resets: Any
    ) -> tuple[Array, Array]:
        return api.chunkwise_recurrence(q, k, v, log_decay, state, beta=beta, resets=resets)

    pair, heads = ("batch", None, "kv_heads", None), ("batch", None, "kv_heads", None, None)
    states = ("batch", "kv_heads", None, None, None)
    names = pair, pair, heads, heads[: log_decay.ndim], states, pair, ("batch", None)
    q, k, v = (x.astype(products) for x in (q, k, v))
    out, state = per_device_call(own, names, (heads, states), (q, k, v, log_decay, state, beta, resets))
    return out.astype(state.dtype), state


class _Blocks(NamedTuple):
    """Tokens in N blocks of C, padded with such as change no state."""

    q: Float[Array, "N B G C K"]
    k: Float[Array, "N B G C K"]
    v: Float[Array, "N B G R C V"]
    log_decay: Float[Array, "N B G R C D"]  # D is 1 or K
    beta: Float[Array, "N B G R C"] | None
    segment: Int32[Array, "N B C"] | None  # resets from the block's start


def _cut(
    q: Array, k: Array, v: Array, log_decay: Array, beta: Array | None, resets: Array | None, size: int
) -> _Blocks:
    def cut(x: Array, pattern: str) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
        return rearrange(x, pattern, c=size)

    decay = log_decay if log_decay.ndim == 5 else log_decay[..., None]
    return _Blocks(
        cut(q, "b (n c) g k -> n b g c k"),
        cut(k, "b (n c) g k -> n b g c k"),
        cut(v, "b (n c) g r v -> n b g r c v"),
        cut(decay, "b (n c) g r d -> n b g r c d"),
        None if beta is None else cut(beta, "b (n c) g r -> n b g r c"),
        None if resets is None else jnp.cumsum(cut(resets, "b (n c) -> n b c"), axis=-1, dtype=jnp.int32),
    )


class _Weights(NamedTuple):
    """What a block's tokens and its first state weigh.

    pairs: of an earlier token for a later one or itself, by decay alone. start: of the first state for a token. end: of
    a token in the last state. whole: of the first state in the last.
    """

    pairs: Float[Array, "N B G R C C D"]
    start: Float[Array, "N B G R C D"]
    end: Float[Array, "N B G R C D"]
    whole: Float[Array, "N B G R D"]


def _weights(blocks: _Blocks) -> _Weights:
    decay, segment = blocks.log_decay, blocks.segment
    if decay.shape[-1] > 1:
        # Differences of sums are rounded as the sum of all decays of the block is: what forgets all is to add little.
        decay = jnp.maximum(decay, 2 * math.log(jnp.finfo(decay.dtype).eps))
    size, start = decay.shape[-2], jnp.cumsum(decay, axis=-2)
    seen = jnp.tril(jnp.ones((size, size), bool))
    if decay.shape[-1] == 1:
        # Summed from each token on: a difference of sums would be rounded as the sum of all decays of the block is.
        after = jnp.tril(seen, -1)[..., None]
        pairs = jnp.cumsum(jnp.where(after, decay[..., :, None, :], 0.0), axis=-3)
    else:
        pairs = start[..., :, None, :] - start[..., None, :, :]
    end, whole = pairs[..., -1, :, :], start[..., -1, :]
    if segment is not None:
        seen = seen & (segment[..., :, None] == segment[..., None, :])
        seen = seen[:, :, None, None]
        at, last = segment[:, :, None, None, :, None], segment[:, :, None, None, -1:]
        start = jnp.where(at == 0, start, -jnp.inf)
        end = jnp.where(at == last[..., None], end, -jnp.inf)
        whole = jnp.where(last == 0, whole, -jnp.inf)
    return _Weights(*(jnp.exp(x) for x in (jnp.where(seen[..., None], pairs, -jnp.inf), start, end, whole)))


def _scores(a: Float[Array, "N B G C K"], k: Float[Array, "N B G C K"], pairs: Array) -> Float[Array, "N B G R C C"]:
    """Products of every `a` with the keys that it sees, each decayed on its way."""
    if pairs.shape[-1] == 1:
        return jnp.einsum("nbgik,nbgjk->nbgij", a, k)[:, :, :, None] * pairs[..., 0]
    # A sum and no product of matrices: the compiler fuses it, and the decays of all pairs and channels are never there.
    return jnp.sum((a[..., :, None, :] * k[..., None, :, :])[:, :, :, None] * pairs, axis=-1)


def _read_blocks(
    blocks: _Blocks, state: Float[Array, "B G R K V"]
) -> tuple[Float[Array, "N B G R C V"], Float[Array, "B G R K V"]]:
    weights = _weights(blocks)
    scores = _scores(blocks.q, blocks.k, weights.pairs)
    channels, delta = weights.pairs.shape[-1] > 1, blocks.beta is not None
    values, erased = blocks.v, None
    if blocks.beta is not None:
        beta = blocks.beta[..., None]
        size, width = values.shape[-2:]
        below = jnp.tril(jnp.ones((size, size), bool), -1)
        system = jnp.where(below, beta * _scores(blocks.k, blocks.k, weights.pairs), 0.0)
        right = jnp.concatenate((beta * values, beta * weights.start * blocks.k[:, :, :, None]), axis=-1)
        solved = jnp.matmul(unit_lower_inverse(system), right)
        values, erased = solved[..., :width], solved[..., width:]
    q, k = blocks.q, blocks.k
    if channels:
        q, k = (x[:, :, :, None] * weight for x, weight in ((q, weights.start), (k, weights.end)))
    by_head = "bgrck" if channels else "bgck"

    def step(state: Array, block: tuple) -> tuple[Array, Array]:
        q, k, values, erased, scores, start, end, whole = block
        if delta:
            values = values - jnp.einsum("bgrck,bgrkv->bgrcv", erased, state)
        old = jnp.einsum(f"{by_head},bgrkv->bgrcv", q, state)
        out = jnp.einsum("bgrij,bgrjv->bgriv", scores, values) + (old if channels else old * start)
        written = jnp.einsum(f"{by_head},bgrcv->bgrkv", k, values if channels else values * end)
        return whole[..., None] * state + written, out

    xs = (q, k, values, erased, scores, weights.start, weights.end, weights.whole)
    if q.shape[0] == 1:
        state, out = step(state, jax.tree.map(lambda x: x[0], xs))
        return out[None], state
    state, out = jax.lax.scan(step, state, xs)
    return out, state
