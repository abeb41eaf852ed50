"""Plain decoding: a few tokens of each stream, one after another, in a loop on the device."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from streamjax.models.decoder import Decoder
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import advance


def next_token(
    ends: Decoder,
    hidden: Float[Array, "B E"],
    used: Bool[Array, "B V"] | None,
    done: Bool[Array, " B"],
    key: Array | None,
    index: Int32[Array, ""],
    sampler: Sampler,
    stop: tuple[int, ...],
) -> tuple[Int32[Array, " B"], Bool[Array, " B"], Bool[Array, " B"], Bool[Array, " B"]]:
    """The next token of each stream, which streams stand still, and who is done or bad now.

    Bad are those whose logits are NaN or infinite; where there is one, all stand still.
    """
    logits = ends.logits(hidden[:, None])[:, 0]
    bad = ~done & ~jnp.isfinite(jnp.max(logits, axis=-1))  # a single -inf is a model's way to forbid a token
    still = done | jnp.any(bad)
    token = sampler.sample(logits, None if key is None else jax.random.fold_in(key, index), used)
    if stop:
        done = done | (~still & (token[:, None] == jnp.array(stop)).any(axis=1))
    return token, still, done, bad


@partial(jax.jit, static_argnames=("sampler", "stop", "block"), donate_argnames="state")
def decode_block(
    model: Decoder,
    state: StreamState,
    done: Bool[Array, " B"],
    key: Array | None,
    index: Int32[Array, ""],
    count: Int32[Array, ""],
    sampler: Sampler,
    stop: tuple[int, ...],
    block: int,
) -> tuple[StreamState, Bool[Array, " B"], Int32[Array, "B N"], Bool[Array, " B"]]:
    """Sample and read `count` <= `block` tokens of each stream, in a loop on the device.

    Token i of the block is drawn with the key folded with `index + i`. Streams that are done keep their state and yield
    -1; when all are done the loop ends. It ends too, with all streams as they were, where the logits of one are NaN or
    infinite; the last result says of which.
    """

    def alive(carry: tuple) -> Array:
        _, done, _, bad, i = carry
        return (i < count) & ~jnp.all(done) & ~jnp.any(bad)

    def one(carry: tuple) -> tuple:
        state, done, out, _, i = carry
        token, still, done, bad = next_token(model, state.hidden, state.used, done, key, index + i, sampler, stop)
        state, _ = advance(model, state, token[:, None], jnp.where(still, 0, 1))
        out = jax.lax.dynamic_update_slice_in_dim(out, jnp.where(still, -1, token)[:, None], i, axis=1)
        return state, done, out, bad, i + 1

    out = jnp.full((done.shape[0], block), -1, jnp.int32)
    carry = (state, done, out, jnp.zeros_like(done), jnp.int32(0))
    state, done, out, bad, _ = jax.lax.while_loop(alive, one, carry)
    return state, done, out, bad
