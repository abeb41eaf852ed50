"""One program that draws a token of each row, and reads it with the guesses behind it that turn out right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from streamjax.models.decoder import Decoder
from streamjax.serving.decoding import Drawn, draw, goes_on, no_choices, noted, put_choice
from streamjax.serving.drafts.walking import go_along
from streamjax.serving.row_sampling import RowSampling
from streamjax.streaming.speculative.two_phases import harmless, look_ahead, take_in_first
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import advance


@partial(jax.jit, donate_argnames=("state", "rows"))
def decode_guessed(
    model: Decoder,
    state: StreamState,
    rows: RowSampling,
    active: Bool[Array, " B"],
    guesses: Int32[Array, "B M N"],
    count: Int32[Array, "B M"],
) -> tuple[StreamState, RowSampling, Drawn]:
    """Draw and read a token of each row that is `active`, and behind it those guesses that the row would draw itself.

    A row has M ways in which it may go on, `count` tokens of each, which differ in their first one. The first token is
    drawn as ever, and says which of the ways it is: a row that goes none of them costs nothing more, and where all do
    so the pass is one over single tokens. Behind it a guess counts if it is the token that the row's own rule chooses
    at that place, with the penalties, the random numbers and the ends of that place. So rows draw what `decode_rows`
    draws.
    """
    assert state.used is not None  # an engine's states note what they have read
    every, width = jnp.arange(active.shape[0]), guesses.shape[2]
    logits = model.logits(state.hidden[:, None])[:, 0]
    first, alive, bad = draw(logits, rows, state.used, active & (rows.remaining > 0))
    rows = noted(rows, first.token, alive)
    fits = (count > 0) & (guesses[:, :, 0] == first.token[:, None])
    way = jnp.argmax(fits, axis=1)
    tokens = guesses[every, way].at[:, 0].set(first.token)
    more = jnp.where(jnp.any(fits, axis=1), jnp.minimum(count[every, way] - 1, rows.remaining), 0)
    more = jnp.where(goes_on(rows, first.token, alive), more, 0)
    out = put_choice(no_choices(rows, width), first, alive, jnp.int32(0))

    def single(carry: tuple) -> tuple:
        return advance(model, carry[0], first.token[:, None], alive.astype(jnp.int32))[0], *carry[1:]

    def several(carry: tuple) -> tuple:
        state, rows, out, _ = carry
        given = harmless(model, state, jnp.where(alive, 1 + more, 0))
        hidden, waiting = look_ahead(model, state, tokens, given)
        used, places = state.used.at[every, first.token].max(alive), jnp.arange(width, dtype=jnp.int32)
        parents = jnp.broadcast_to(jnp.maximum(places - 1, 0), tokens.shape)
        there = places < given[:, None]
        logits = model.logits(hidden[:, :-1])
        now, read, _ = go_along(logits, tokens, parents, there, rows, used, out, given > 1)
        taken = jnp.sum(read.token >= 0, axis=1, dtype=jnp.int32)
        return take_in_first(model, state, waiting, hidden, tokens, taken), now, read, jnp.maximum(given - 1, 0)

    carry, wide = (state, rows, out, jnp.zeros_like(more)), jnp.any(more > 0)
    state, rows, out, guessed = _where(~wide, single, _where(wide, several, carry))
    return state, rows, Drawn(**out._asdict(), bad=bad, guessed=guessed, wide=wide)


def _where(condition: Bool[Array, ""], step: Callable[[tuple], tuple], carry: tuple) -> tuple:
    """`step(carry)` where a condition holds, else the carry. A loop: `jax.lax.cond` would copy the caches."""
    found: tuple = jax.lax.while_loop(lambda x: x[0], lambda x: (jnp.zeros_like(x[0]), step(x[1])), (condition, carry))[
        1
    ]
    return found
