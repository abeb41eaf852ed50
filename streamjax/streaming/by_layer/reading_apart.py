"""What `sj.read`, `sj.score` and `sj.generate` do with streams whose tokens lie on a second mesh (`second_mesh`).

A step over two meshes is many programs, which the host calls. So there is no loop on the device here: chunks are read,
and tokens drawn, one after the other from the host. Results are those of the loops that they stand in for.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import without_layers
from streamjax.streaming.by_layer.second_mesh import advance_apart, lies_apart
from streamjax.streaming.decode_block import next_token
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import surprise


def refuse_apart(state: StreamState, what: str) -> None:
    """Raise a ValueError where the streams' tokens lie on a second mesh, which `what` does not know."""
    if lies_apart(state):
        raise ValueError(f"{what} is not there for streams whose tokens lie on a second mesh: leave that mesh away")


def read_chunk_apart(
    model: Decoder, state: StreamState, tokens: Int32[Array, "B C"], count: Int32[Array, " B"], *, scored: bool = False
) -> tuple[StreamState, Float[Array, "B C"] | None]:
    """Read one chunk of tokens that were checked before; nats a token if `scored`. The layers' states are donated."""
    before = dataclasses.replace(state, layers=(), caches=())
    state, hidden = advance_apart(model, state, tokens, count)
    return state, _nats(without_layers(model), before, hidden, tokens, count) if scored else None


def decode_apart(
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
    """`decode_block` over two meshes: the same arguments, the same results."""
    ends, bad = without_layers(model), jnp.zeros_like(done)
    columns = []
    for i in range(int(count)):
        if stop and bool(done.all()):
            break
        token, given, shown, done, bad = _drawn(
            ends, state.hidden, state.used, done, bad, key, index + i, sampler, stop
        )
        state, _ = advance_apart(model, state, token, given)
        columns.append(shown)
    columns += [jnp.full_like(done, -1, jnp.int32)] * (block - len(columns))
    return state, done, jnp.stack(columns, axis=1), bad


@jax.jit
def _nats(ends: Decoder, before: StreamState, hidden: Array, tokens: Array, count: Array) -> Array:
    return surprise(ends, before, hidden, tokens, count)


@partial(jax.jit, static_argnames=("sampler", "stop"))
def _drawn(
    ends: Decoder,
    hidden: Float[Array, "B E"],
    used: Bool[Array, "B V"] | None,
    done: Bool[Array, " B"],
    bad: Bool[Array, " B"],
    key: Array | None,
    index: Int32[Array, ""],
    sampler: Sampler,
    stop: tuple[int, ...],
) -> tuple[Array, Array, Array, Array, Array]:
    """The next token of each stream, how many of it are read (0 or 1), what is shown of it, and who is done or bad."""
    stood = jnp.any(bad)  # before this token: nobody goes on
    token, still, after, more = next_token(ends, hidden, used, done | stood, key, index, sampler, stop)
    done = jnp.where(stood, done, after)
    return token[:, None], jnp.where(still, 0, 1), jnp.where(still, -1, token), done, bad | more
