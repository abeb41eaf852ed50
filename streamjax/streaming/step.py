"""One step of the stream: a chunk of C new tokens for each of B streams, C = 512 to prefill, C = 1 to decode."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from streamjax.attention.token_tree import TokenTree
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import ChunkContext
from streamjax.parallel.multiprocess import on_host
from streamjax.streaming.state import SEEN_LIMIT, StreamState


def advance(
    model: Decoder,
    state: StreamState,
    tokens: Int[Array, "B C"],
    count: Int32[Array, " B"] | None = None,
    *,
    differentiable: bool = False,
    memorise: int | None = None,
) -> tuple[StreamState, Float[Array, "B C E"]]:
    """Read a chunk; return the new state and the hidden states of its tokens. For use under `jax.jit`.

    `count` says how many tokens of each row are real (a prefix of the row; all where None). Rows of which none is real
    keep their state. From the first token beyond a `dense` cache's capacity on, hidden states are NaN. With
    `differentiable` there is a reverse mode, from the hidden states and the new state to the model and the old state.
    With `memorise` the layers above that memory layer are left out (`Decoder.stream`).

    Raises:
      ValueError: another number of rows than streams.
    """
    check_rows(state, tokens.shape[0])
    count = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32) if count is None else count.astype(jnp.int32)
    context, tokens = enter(state, tokens, count, differentiable)
    hidden, layers = model.stream(tokens, state.layers, state.caches, context, memorise)
    return leave(dataclasses.replace(state, layers=layers), hidden, tokens, count)


def enter(
    state: StreamState,
    tokens: Int[Array, "B C"],
    count: Int32[Array, " B"] | None,
    differentiable: bool = False,
    tree: TokenTree | None = None,
) -> tuple[ChunkContext, Int[Array, "B C"]]:
    """Where the tokens of a chunk stand, and the tokens, zeros where there is padding.

    There are `count` of each row, or those nodes of a `tree` that are given.
    """
    offset = jnp.arange(tokens.shape[1], dtype=jnp.int32) if tree is None else tree.depth
    if tree is None:
        assert count is not None
        valid = offset < count[:, None]
    else:
        valid = tree.given
    # Padding may hold ids that the model lacks; NaN keys and values would reach the real tokens through their mask.
    tokens = jnp.where(valid, tokens, 0)
    context = ChunkContext(
        position=state.position[:, None] + offset.astype(jnp.uint32),
        valid=valid,
        seen=state.seen,
        span=state.span,
        differentiable=differentiable,
        ids=tokens.astype(jnp.int32) if any(cache.needs_ids for cache in state.caches) else None,
        implementation=state.implementation,
        tables=state.tables,
        shared=state.shared,
        tree=tree,
    )
    return context, tokens


def leave(
    state: StreamState, hidden: Float[Array, "B C E"], tokens: Int[Array, "B C"], count: Int32[Array, " B"]
) -> tuple[StreamState, Float[Array, "B C E"]]:
    """The state behind a chunk that its layers have read, and the hidden states, NaN beyond a cache's capacity."""
    hidden = nan_beyond_capacity(state, hidden, jnp.arange(hidden.shape[1], dtype=jnp.int32))
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    valid = jnp.arange(tokens.shape[1], dtype=jnp.int32) < count[:, None]
    new = dataclasses.replace(
        state,
        position=state.position + count.astype(jnp.uint32),
        seen=jnp.minimum(state.seen + count, SEEN_LIMIT),
        hidden=jnp.where((count > 0)[:, None], last, state.hidden),
        used=None if state.used is None else state.used.at[jnp.arange(len(count))[:, None], tokens].max(valid),
    )
    return new.placed(), hidden


def nan_beyond_capacity(
    state: StreamState, hidden: Float[Array, "B C E"], offset: Int32[Array, "*#B C"]
) -> Float[Array, "B C E"]:
    """Hidden states of a chunk whose tokens stand `offset` places behind the stream, NaN where the cache ends."""
    if state.capacity is None:
        return hidden
    # Here and not in attention: a NaN value would reach every query of its chunk in the layers above.
    return jnp.where((state.seen[:, None] + offset >= state.capacity)[:, :, None], jnp.nan, hidden)


def surprise(
    model: Decoder,
    before: StreamState,
    hidden: Float[Array, "B C E"],
    tokens: Int32[Array, "B C"],
    count: Int32[Array, " B"],
) -> Float[Array, "B C"]:
    """Nats a token of a chunk: `before` is the state in front of it, `hidden` are its hidden states; 0 at padding."""
    logits = model.logits(jnp.concatenate((before.hidden[:, None], hidden[:, :-1]), axis=1))
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    offset = jnp.arange(tokens.shape[1])
    # Nothing predicts a stream's first token: it costs what a uniform guess costs.
    first = (before.seen == 0)[:, None] & (offset == 0)
    nll = jnp.where(first, np.float32(np.log(model.config.vocab_size)), nll)
    return jnp.where(offset < count[:, None], nll, 0.0)


@partial(jax.jit, donate_argnames="state")
def step(
    model: Decoder,
    state: StreamState,
    tokens: Int[Array, "B C"],
    count: Int32[Array, " B"] | None = None,
) -> tuple[StreamState, Float[Array, "B C V"]]:
    """Read a chunk of C tokens a stream and return the logits after each.

    The state is donated: use the returned one. A stream beyond a `dense` cache's capacity gets NaN logits. Logits of
    padding (beyond `count`) mean nothing. Ids are not checked, which would wait for the device: one beyond the
    vocabulary makes its stream NaN, a negative one counts from the vocabulary's end. `read`, `score` and `generate`
    check them.

    Args:
      model: the model.
      state: from `init_state` or an earlier step.
      tokens: int32 ids in [0, V); each row one stream, right-padded.
      count: real tokens in each row; all where None.

    Returns:
      The new state and float32 logits [B, C, V].

    Example:
      >>> state, logits = sj.step(model, state, prompt)
      >>> logits.shape, int(logits[0, -1].argmax()) < 259
      ((1, 16, 259), True)
    """
    state, hidden = advance(model, state, tokens, count)
    return state, model.logits(hidden)


def check_rows(state: StreamState, rows: int) -> None:
    """Raise a ValueError unless there is one row of tokens for every stream."""
    if rows != state.batch_size:
        raise ValueError(f"{rows} rows of tokens for {state.batch_size} streams; give one row for each stream")


def require_room(state: StreamState, tokens: np.ndarray) -> None:
    """Raise a ValueError unless each stream can take its number of `tokens` [B] more; endless caches always can."""
    check_rows(state, len(tokens))
    if state.capacity is not None:
        for used, more in zip(on_host(state.seen).tolist(), tokens.tolist(), strict=True):
            if more and used + more > state.capacity:
                raise ValueError(
                    f"the cache holds {state.capacity} tokens: {used} are used and {more} more do not fit; "
                    "raise its capacity or use an endless cache such as streaming_llm"
                )
