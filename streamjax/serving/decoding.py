"""One program that decodes all rows of a batch: it draws a token of each row and reads it, a few times over."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from streamjax.models.decoder import Decoder
from streamjax.serving.row_sampling import Choice, RowSampling, choose
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import advance


class Drawn(NamedTuple):
    """What N steps drew; -1 where a row stood still.

    bad: rows whose logits are NaN or infinite; they stand where they stood before.
    """

    token: Int32[Array, "B N"]
    logprob: Float[Array, "B N"]
    top_token: Int32[Array, "B N A"]
    top_logprob: Float[Array, "B N A"]
    bad: Bool[Array, " B"]


@partial(jax.jit, static_argnames="block", donate_argnames=("state", "rows"))
def decode_rows(
    model: Decoder,
    state: StreamState,
    rows: RowSampling,
    active: Bool[Array, " B"],
    count: Int32[Array, ""],
    block: int,
) -> tuple[StreamState, RowSampling, Drawn]:
    """Draw and read `count` <= `block` tokens of each row that is `active`, has tokens remaining and has not ended."""
    batch = active.shape[0]

    def going(carry: tuple) -> Array:
        _, _, alive, _, _, i = carry
        return (i < count) & jnp.any(alive)

    def one(carry: tuple) -> tuple:
        state, rows, alive, bad, out, i = carry
        logits = model.logits(state.hidden[:, None])[:, 0].astype(jnp.float32)
        broken = alive & ~jnp.isfinite(jnp.max(logits, axis=-1))  # a single -inf is a model's way to forbid a token
        alive, bad = alive & ~broken, bad | broken
        choice = choose(logits, rows, state.used, alive)
        token = choice.token
        state, _ = advance(model, state, token[:, None], alive.astype(jnp.int32))
        out = jax.tree.map(
            lambda to, x: jax.lax.dynamic_update_slice_in_dim(to, x[:, None], i, axis=1),
            out,
            choice._replace(token=jnp.where(alive, token, -1)),
        )
        every = jnp.arange(batch)
        rows = dataclasses.replace(
            rows,
            index=rows.index + alive,
            remaining=rows.remaining - alive,
            counts=rows.counts.at[every, token].add(alive.astype(jnp.int32)),
        )
        return state, rows, alive & (rows.remaining > 0) & ~rows.ends[every, token], bad, out, i + 1

    shapes = jax.eval_shape(lambda: choose(jnp.zeros(rows.bias.shape, jnp.float32), rows, rows.ends, active))
    out: Choice = jax.tree.map(lambda x: jnp.zeros((batch, block, *x.shape[1:]), x.dtype), shapes)
    out = out._replace(token=out.token - 1)
    carry = (state, rows, active & (rows.remaining > 0), jnp.zeros_like(active), out, jnp.int32(0))
    state, rows, _, bad, out, _ = jax.lax.while_loop(going, one, carry)
    return state, rows, Drawn(*out, bad)


@partial(jax.jit, donate_argnames="rows")
def enter_row(rows: RowSampling, row: Int32[Array, ""], one: RowSampling) -> RowSampling:
    """The rows with a request in one of them."""
    return jax.tree.map(lambda x, part: x.at[row].set(part), rows, one)


@partial(jax.jit, donate_argnames="rows")
def set_bias(rows: RowSampling, row: Int32[Array, ""], bias: Float[Array, " V"]) -> RowSampling:
    """The rows, one of which has another bias from now on."""
    return dataclasses.replace(rows, bias=rows.bias.at[row].set(bias))
