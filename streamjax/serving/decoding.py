"""One program that decodes all rows of a batch: it draws a token of each row and reads it, a few times over."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from streamjax.models.decoder import Decoder, FlatModel
from streamjax.serving.row_sampling import Choice, RowSampling, choose
from streamjax.serving.row_states import first_rows, with_first_rows
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import advance


class Drawn(NamedTuple):
    """What N steps drew; -1 where a row stood still.

    bad: rows whose logits are NaN or infinite; they stand where they stood before. guessed: guesses that were read of
    each row, right or wrong. wide: whether a pass read several tokens of a row.
    """

    token: Int32[Array, "B N"]
    logprob: Float[Array, "B N"]
    top_token: Int32[Array, "B N A"]
    top_logprob: Float[Array, "B N A"]
    bad: Bool[Array, " B"]
    guessed: Int32[Array, " B"]
    wide: Bool[Array, ""]


def draw(
    logits: Float[Array, "B V"], rows: RowSampling, used: Bool[Array, "B V"], alive: Bool[Array, " B"]
) -> tuple[Choice, Bool[Array, " B"], Bool[Array, " B"]]:
    """The next token of each row that is `alive`; which of them have one, and which have none: their logits are bad."""
    logits = logits.astype(jnp.float32)
    broken = alive & ~jnp.isfinite(jnp.max(logits, axis=-1))  # a single -inf is a model's way to forbid a token
    return choose(logits, rows, used, alive & ~broken), alive & ~broken, broken


def noted(rows: RowSampling, token: Int32[Array, " B"], alive: Bool[Array, " B"]) -> RowSampling:
    """The rows, of which those that are `alive` have drawn a token."""
    return dataclasses.replace(
        rows,
        index=rows.index + alive,
        remaining=rows.remaining - alive,
        counts=rows.counts.at[jnp.arange(len(token)), token].add(alive.astype(jnp.int32)),
    )


def goes_on(rows: RowSampling, token: Int32[Array, " B"], alive: Bool[Array, " B"]) -> Bool[Array, " B"]:
    """Which rows draw another token behind this one."""
    return alive & (rows.remaining > 0) & ~rows.ends[jnp.arange(len(token)), token]


def no_choices(rows: RowSampling, steps: int) -> Choice:
    """Room for what N steps draw."""
    batch = len(rows.index)
    shapes = jax.eval_shape(lambda: choose(rows.bias, rows, rows.ends, rows.index > 0))
    out: Choice = jax.tree.map(lambda x: jnp.zeros((batch, steps, *x.shape[1:]), x.dtype), shapes)
    return out._replace(token=out.token - 1)


def put_choice(out: Choice, choice: Choice, alive: Bool[Array, " B"], step: Int32[Array, ""]) -> Choice:
    """What a step drew, in its place."""
    return jax.tree.map(
        lambda to, x: jax.lax.dynamic_update_slice_in_dim(to, x[:, None], step, axis=1),
        out,
        choice._replace(token=jnp.where(alive, choice.token, -1)),
    )


@partial(jax.jit, static_argnames=("block", "width"), donate_argnames=("state", "rows"))
def decode_rows(
    flat: FlatModel,
    state: StreamState,
    rows: RowSampling,
    active: Bool[Array, " B"],
    count: Int32[Array, ""],
    block: int,
    width: int,
) -> tuple[StreamState, RowSampling, Drawn]:
    """Draw and read `count` <= `block` tokens of each row that is `active`, has tokens remaining and has not ended.

    Only the first `width` rows are computed: the others are not active.
    """
    if width < len(active):
        first = first_rows(state, width)
        few, sampling, drawn = _decode(flat.model, first, first_sampling(rows, width), active[:width], count, block)
        return with_first_rows(state, few), *of_all_rows(rows, sampling, drawn)
    return _decode(flat.model, state, rows, active, count, block)


def first_sampling(rows: RowSampling, width: int) -> RowSampling:
    """That of the first rows."""
    return jax.tree.map(lambda x: x[:width], rows)


def of_all_rows(rows: RowSampling, few: RowSampling, drawn: Drawn) -> tuple[RowSampling, Drawn]:
    """Sampling of all rows, and what was drawn of them, where only the first ones drew."""
    still = jnp.zeros(len(rows.index), bool)
    nothing = Drawn(*no_choices(rows, drawn.token.shape[1]), still, still.astype(jnp.int32), still)
    every = _with_first(nothing, drawn._replace(wide=drawn.bad))
    return _with_first(rows, few), every._replace(wide=drawn.wide)


def _with_first(whole: Any, part: Any) -> Any:
    """Arrays of rows, the first of which are replaced by those of a part."""
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, 0, 0), whole, part)


def _decode(
    model: Decoder,
    state: StreamState,
    rows: RowSampling,
    active: Bool[Array, " B"],
    count: Int32[Array, ""],
    block: int,
) -> tuple[StreamState, RowSampling, Drawn]:
    """All rows of what it is given."""

    def going(carry: tuple) -> Array:
        _, _, alive, _, _, i = carry
        return (i < count) & jnp.any(alive)

    def one(carry: tuple) -> tuple:
        state, rows, alive, bad, out, i = carry
        choice, alive, broken = draw(model.logits(state.hidden[:, None])[:, 0], rows, state.used, alive)
        state, _ = advance(model, state, choice.token[:, None], alive.astype(jnp.int32))
        rows, out = noted(rows, choice.token, alive), put_choice(out, choice, alive, i)
        return state, rows, goes_on(rows, choice.token, alive), bad | broken, out, i + 1

    none = jnp.zeros_like(active)
    carry = (state, rows, active & (rows.remaining > 0), none, no_choices(rows, block), jnp.int32(0))
    state, rows, _, bad, out, _ = jax.lax.while_loop(going, one, carry)
    return state, rows, Drawn(*out, bad, none.astype(jnp.int32), jnp.array(False))


@partial(jax.jit, donate_argnames="rows")
def enter_row(rows: RowSampling, row: Int32[Array, ""], one: RowSampling) -> RowSampling:
    """The rows with a request in one of them."""
    return jax.tree.map(lambda x, part: x.at[row].set(part), rows, one)


@partial(jax.jit, donate_argnames="rows")
def set_bias(rows: RowSampling, row: Int32[Array, ""], bias: Float[Array, " V"]) -> RowSampling:
    """The rows, one of which has another bias from now on."""
    return dataclasses.replace(rows, bias=rows.bias.at[row].set(bias))
