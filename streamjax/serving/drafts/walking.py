"""Going along guesses: each row draws token after token by its own rule, for as long as what it draws was guessed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from streamjax.serving.decoding import draw, goes_on, noted, put_choice
from streamjax.serving.row_sampling import Choice, RowSampling


def go_along(
    logits: Float[Array, "B _ V"],
    tokens: Int32[Array, "B N"],
    parents: Int32[Array, "B N"],
    there: Bool[Array, "B N"],
    rows: RowSampling,
    used: Bool[Array, "B V"],
    out: Choice,
    on: Bool[Array, " B"],
) -> tuple[RowSampling, Choice, Int32[Array, "B D"]]:
    """Draw behind the root of each row's tree, then behind the node that was drawn, until no node is.

    Each token is drawn with the penalties, the random number and the ends of its place, so it is the token that the row
    would have drawn without guesses.

    Args:
      logits: behind the nodes; nothing is drawn behind a last one, whose logits may be missing.
      tokens, parents, there: the nodes, parents first; node 0 is the root, which has been drawn and noted.
      rows, used: the rows and the ids that their streams have read, with the roots.
      out: room for the D tokens of the longest path, with the roots.
      on: rows that draw a token behind the root.

    Returns:
      The rows, what they drew, and the node of each of these tokens; behind the last one any.
    """
    every, guess = jnp.arange(tokens.shape[0]), there & (jnp.arange(tokens.shape[1]) > 0)

    def children(at: Array) -> Array:
        return guess & (parents == at[:, None])

    def going(carry: tuple) -> Array:
        return jnp.any(carry[2])

    def place(carry: tuple) -> tuple:
        rows, used, alive, at, out, path, i = carry
        here = jnp.take_along_axis(logits, at[:, None, None], axis=1, mode="clip")[:, 0]
        choice, alive, _ = draw(here, rows, used, alive)
        fits = children(at) & (tokens == choice.token[:, None])
        alive &= jnp.any(fits, axis=1)
        at = jnp.where(alive, jnp.argmax(fits, axis=1).astype(jnp.int32), at)
        rows, out = noted(rows, choice.token, alive), put_choice(out, choice, alive, i)
        used = used.at[every, choice.token].max(alive)
        path = jax.lax.dynamic_update_slice_in_dim(path, at[:, None], i, axis=1)
        alive = goes_on(rows, choice.token, alive) & jnp.any(children(at), axis=1)
        return rows, used, alive, at, out, path, i + 1

    root, path = jnp.zeros_like(tokens[:, 0]), jnp.zeros_like(out.token)
    carry = (rows, used, on & jnp.any(children(root), axis=1), root, out, path, jnp.int32(1))
    rows, _, _, _, out, path, _ = jax.lax.while_loop(going, place, carry)
    return rows, out, path
