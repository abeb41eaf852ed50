"""Reading a chunk in pieces that end where a cache changes what queries read, each row of a batch in pieces of its own.

Where tiers choose what goes, blocks of `every` tokens follow each other from a stream's first token on, and no choice
depends on how a stream is cut. With `every = 4`, a row that has read 6 tokens takes 2 tokens of the next chunk in the
first piece, 4 in the next one, and so on. A piece is `every` wide, or as wide as the chunk if that is less, padded on
the right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import accumulator
from streamjax.kv.query import EvictionBlock, KVTokens, Query, State

Update = Callable[[State, Query, KVTokens], tuple[Float[Array, "B C H D"], State]]


def read_in_blocks(
    update: Update,
    clock: Callable[[State], Int32[Array, " B"]],
    every: int,
    held: int,
    state: State,
    query: Query,
    tokens: KVTokens,
) -> tuple[Float[Array, "B C H D"], State]:
    """`update` of a chunk, piece by piece.

    Args:
      update: attends a piece and stores it.
      clock: tokens of each row since its block began, in [0, every).
      every: tokens a block.
      held: tokens that are held at most.
      state, query, tokens: what `update` takes, of a whole chunk.
    """
    width = query.q.shape[1]

    def step(state: State, query: Query, tokens: KVTokens) -> tuple[Array, State]:
        return update(state, dataclasses.replace(query, block=EvictionBlock(clock(state), every, held)), tokens)

    if width == 1:
        return step(state, query, tokens)
    most = -(-(width + every - 1) // every) if query.differentiable else None

    def left(state: State) -> Int32[Array, " B"]:
        return every - clock(state)

    return read_in_pieces(step, left, min(every, width), state, query, tokens, most)


def read_in_pieces(
    update: Update,
    left: Callable[[State], Int32[Array, " B"]],
    piece: int,
    state: State,
    query: Query,
    tokens: KVTokens,
    most: int | None = None,
) -> tuple[Float[Array, "B C H D"], State]:
    """`update` of a chunk, piece by piece.

    Args:
      update: attends a piece and stores it.
      left: tokens that each row's next piece has at most, at least 1.
      piece: tokens a piece at most.
      state, query, tokens: what `update` takes, of a whole chunk.
      most: so many turns are taken, where there is a reverse mode: a loop without a fixed end has none.
    """
    width = query.q.shape[1]
    _, count = tokens.run()
    own, stored = by_token(query, tokens)
    own, stored = _padded(own, 1, piece), _padded(stored, 2, piece)
    channels = tokens.v.shape[-1] or tokens.k.shape[-1]
    shape = (query.q.shape[0], width + piece, query.q.shape[2], channels)
    out = jnp.zeros(shape, accumulator(query.q.dtype))

    def read(carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
        state, out, start = carry
        some = jnp.minimum(jnp.minimum(left(state), piece), count - start)
        valid = jnp.arange(piece, dtype=jnp.int32) < some[:, None]
        mine, theirs = _cut(own, start, 1, piece), _cut(stored, start, 2, piece)
        found, state = update(
            state,
            dataclasses.replace(query, **mine, seen=query.seen + start, valid=valid),
            dataclasses.replace(tokens, **theirs, valid=valid[:, None]),
        )
        # What a piece computed of padding, the next piece overwrites, or it lies behind the row's tokens.
        out = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0))(
            out, found.astype(out.dtype), start
        )
        return state, out, start + some

    first = (state, out, jnp.zeros_like(count))
    if most is not None:
        last, _ = jax.lax.scan(lambda carry, _: (read(carry), None), first, None, length=most)
    else:
        last = jax.lax.while_loop(lambda carry: (carry[2] < count).any(), read, first)
    return last[1][:, :width], last[0]


def by_token(query: Query, tokens: KVTokens) -> tuple[dict[str, Array], dict[str, Array]]:
    """What a chunk has for each token: of its queries, tokens along axis 1, and of its tokens, along axis 2."""
    own = {name: getattr(query, name) for name in ("q", "raw_q", "position", "back")}
    stored = {name: getattr(tokens, name) for name in ("k", "v", "raw_k", "position", "score", "ids")}
    some, others = ({name: x for name, x in each.items() if x is not None} for each in (own, stored))
    return some, others


def _padded(arrays: dict[str, Any], axis: int, more: int) -> dict[str, Any]:
    return {name: jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)]) for name, x in arrays.items()}


def _cut(arrays: dict[str, Any], start: Int32[Array, " B"], axis: int, width: int) -> dict[str, Any]:
    """`width` tokens of each row from `start[row]` on."""

    def one(x: Array, at: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, at, width, axis - 1)

    return {name: jax.vmap(one)(x, start) for name, x in arrays.items()}
