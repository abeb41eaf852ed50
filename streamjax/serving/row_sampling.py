"""Choosing the next token of every row, each by its own rule. Rules are data, so no request compiles anything.

A row's token is the one that `Sampler` chooses with the same settings and the same key, except that thresholds of top-k
and top-p are found by bisection over the bits of the logits: a sort of the vocabulary costs more than the step itself.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

from streamjax.serving.requests import Request
from streamjax.streaming.sampling import first_largest

MOST_ALTERNATIVES = 20  # log-probabilities a token; what OpenAI's API allows at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """How the tokens of B rows are chosen, and when they end; one row's (no B) is what a request asks for.

    key: of threefry. index: of the next token in its request, which the key is folded with. remaining: tokens that may
    still come. alternatives: log-probabilities that are asked for besides the token's own; -1 asks for none. counts:
    how often the request has generated each token. bias: is added to logits; -inf forbids. ends: tokens that end it.
    """

    temperature: Float[Array, "*B"]
    top_k: Int32[Array, "*B"]
    top_p: Float[Array, "*B"]
    min_p: Float[Array, "*B"]
    repetition_penalty: Float[Array, "*B"]
    presence_penalty: Float[Array, "*B"]
    frequency_penalty: Float[Array, "*B"]
    key: UInt32[Array, "*B 2"]
    index: Int32[Array, "*B"]
    remaining: Int32[Array, "*B"]
    alternatives: Int32[Array, "*B"]
    counts: Int32[Array, "*B V"]
    bias: Float[Array, "*B V"]
    ends: Bool[Array, "*B V"]


class Choice(NamedTuple):
    """What was drawn: tokens; where asked for, their log-probabilities and the most likely tokens with theirs."""

    token: Int32[Array, " B"]
    logprob: Float[Array, " B"]
    top_token: Int32[Array, "B N"]
    top_logprob: Float[Array, "B N"]


def no_rows(rows: int, vocab_size: int) -> RowSampling:
    """Rows that generate nothing."""

    def full(value: float, dtype: type, *shape: int) -> Array:
        return jnp.asarray(np.full((rows, *shape), value, dtype))

    return RowSampling(
        **{name: full(1, np.float32) for name in ("temperature", "top_p", "repetition_penalty")},
        **{name: full(0, np.float32) for name in ("min_p", "presence_penalty", "frequency_penalty")},
        **{name: full(0, np.int32) for name in ("top_k", "index", "remaining")},
        alternatives=full(-1, np.int32),
        key=full(0, np.uint32, 2),
        counts=full(0, np.int32, vocab_size),
        bias=full(0, np.float32, vocab_size),
        ends=full(False, np.bool_, vocab_size),
    )


def one_row(request: Request, generated: list[int], vocab_size: int) -> RowSampling:
    """What a request asks of its row after the tokens that it has `generated` already."""
    sampling, seed = request.sampling, request.sampling.seed
    bias = np.zeros(vocab_size, np.float32)
    for token, added in sampling.logit_bias:
        bias[token] += added
    ends = np.zeros(vocab_size, bool)
    ends[list(request.stop_ids)] = True
    numbers = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")

    def number(value: float, dtype: type = np.float32) -> Array:
        return jnp.asarray(np.array(value, dtype))

    return RowSampling(
        **{name: number(getattr(sampling, name)) for name in numbers},
        top_k=number(min(sampling.top_k, vocab_size), np.int32),
        key=jnp.asarray(np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)),
        index=number(len(generated), np.int32),
        remaining=number(request.max_new_tokens - len(generated), np.int32),
        alternatives=number(-1 if request.logprobs is None else request.logprobs, np.int32),
        counts=jnp.asarray(np.bincount(np.asarray(generated, np.int64), minlength=vocab_size).astype(np.int32)),
        bias=jnp.asarray(bias),
        ends=jnp.asarray(ends),
    )


def choose(
    logits: Float[Array, "B V"], rows: RowSampling, used: Bool[Array, "B V"], alive: Bool[Array, " B"]
) -> Choice:
    """The next token of each row; rows that are not `alive` cost nothing and get any token."""
    changed = penalised(logits, rows, used)
    drawn = alive & (rows.temperature > 0)

    def draw() -> Array:
        filtered = keep_likely(changed, rows, drawn)
        keys = jax.random.wrap_key_data(rows.key, impl="threefry2x32")
        keys = jax.vmap(jax.random.fold_in)(keys, rows.index)
        return jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)

    best = first_largest(changed)
    token = jnp.where(drawn, jax.lax.cond(jnp.any(drawn), draw, lambda: best), best)
    most = min(MOST_ALTERNATIVES, logits.shape[-1])

    def report() -> tuple[Array, Array, Array]:
        total = jax.nn.logsumexp(logits, axis=-1)
        own = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - total
        top, place = jax.lax.top_k(logits, most)
        return own, place.astype(jnp.int32), top - total[:, None]

    def nothing() -> tuple[Array, Array, Array]:
        shape = (len(logits), most)
        return jnp.zeros(shape[0], jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    asked = jnp.any(alive & (rows.alternatives >= 0))
    return Choice(token, *jax.lax.cond(asked, report, nothing))


def penalised(logits: Float[Array, "B V"], rows: RowSampling, used: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits after penalties and biases; what does nothing changes no bit."""

    def changed() -> Array:
        factor = rows.repetition_penalty[:, None]
        found = jnp.where(used, jnp.where(logits > 0, logits / factor, logits * factor), logits)
        found = found - rows.presence_penalty[:, None] * (rows.counts > 0)
        return found - rows.frequency_penalty[:, None] * rows.counts

    some = (rows.repetition_penalty != 1) | (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)
    return jax.lax.cond(jnp.any(some), changed, lambda: logits) + rows.bias


def keep_likely(logits: Float[Array, "B V"], rows: RowSampling, drawn: Bool[Array, " B"]) -> Float[Array, "B V"]:
    """Logits after temperature, top-k, top-p and min-p, as `Sampler.filter`; removed tokens are -inf."""
    logits = logits / jnp.where(drawn, rows.temperature, 1)[:, None]
    few = drawn & (rows.top_k > 0)

    def best_k() -> Array:
        bits = ordered_bits(logits)
        least = _largest(lambda t: jnp.sum(bits >= t[:, None], axis=-1) >= rows.top_k, len(bits))
        return jnp.where(few[:, None] & (bits < least[:, None]), -jnp.inf, logits)

    logits = jax.lax.cond(jnp.any(few), best_k, lambda: logits)
    part = drawn & (rows.top_p < 1)

    def best_p() -> Array:
        bits, weights = ordered_bits(logits), jax.nn.softmax(logits, axis=-1)

        def more_likely_ones_suffice(t: Array) -> Array:
            return jnp.sum(jnp.where(bits > t[:, None], weights, 0), axis=-1) >= rows.top_p

        last_out = _largest(more_likely_ones_suffice, len(bits))
        return jnp.where(part[:, None] & (bits <= last_out[:, None]), -jnp.inf, logits)

    logits = jax.lax.cond(jnp.any(part), best_p, lambda: logits)
    floor = jnp.max(logits, axis=-1) + jnp.log(rows.min_p)  # log(0) is -inf, and keeps all
    return jnp.where(logits >= floor[:, None], logits, -jnp.inf)


def ordered_bits(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Unsigned numbers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds, rows: int) -> UInt32[Array, " B"]:  # type: ignore[no-untyped-def]  # of numbers to truths, [B] each
    """The largest number at which something holds that holds up to it and not beyond; 0 where it holds nowhere."""

    def bit(i: Array, found: Array) -> Array:
        tried = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(tried), tried, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(rows, jnp.uint32))
