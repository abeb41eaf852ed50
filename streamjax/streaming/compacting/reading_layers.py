"""Queries that read what streams hold, layer by layer, without being stored: what compaction and budgets decide by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from streamjax.kv.cache import Cache
from streamjax.kv.layer_caches.recurrence import Recurrence
from streamjax.kv.layer_caches.slots_of import SlotsOf
from streamjax.kv.query import State
from streamjax.models.decoder import Block, Decoder
from streamjax.models.layer_stacking import layer_of
from streamjax.models.mixers.attention import ChunkContext
from streamjax.models.mixers.handed_on.learned_bounds import with_bounds
from streamjax.parallel.multiprocess import on_host
from streamjax.streaming.state import StreamState
from streamjax.streaming.token_rows import Rows, as_rows, require_ids, require_one_length


def through_layers(
    model: Decoder,
    state: StreamState,
    query: Rows | None,
    stored: bool,
    works: Sequence[Cache],
    said: Sequence[Any],
    leaders: Mapping[int, int] | None = None,
) -> list[Any]:
    """What each layer's work makes of its state, and of what was said before, when these queries read it.

    leaders: layers whose work is given what that of an earlier layer has made, too.

    A recurrent layer keeps its state, and queries go through it as tokens that come next.

    Raises:
      ValueError: rows that are no queries of these streams; recurrent layers, which cannot read tokens again.
    """
    if query is not None and stored and any(isinstance(work, Recurrence) for work in works):
        raise ValueError(
            "a model with recurrent layers cannot read tokens again: give a query that comes next, with stored=False"
        )
    model, (tokens, context) = with_bounds(model), standing(model, state, query, stored)
    x = embedded(model, tokens)
    made: list[Any] = []
    for i, (work, part, before) in enumerate(zip(works, state.layers, said, strict=True)):
        block, row = model.layer_and_row(i)
        if isinstance(work, Recurrence):
            x, new = x if query is None else passed(block, row, x, part, context, work), part
        else:
            led = (made[leaders[i]],) if leaders and i in leaders else ()
            x, new = layer_read(block, row, x, (part, before, *led), context, work)
        made.append(new)
    return made


def standing(
    model: Decoder, state: StreamState, query: Rows | None, stored: bool
) -> tuple[Int32[Array, "B C"], ChunkContext]:
    """The queries, at least two and padded in front, and where they stand.

    Raises:
      ValueError: rows that are no queries of these streams; layers that read other layers' keys.
    """
    if any(isinstance(cache, SlotsOf) for cache in state.caches):
        raise ValueError("layers of this model read other layers' keys and values: they cannot be read layer by layer")
    rows = state.batch_size
    ids, lengths = (np.zeros((rows, 0), np.int64), None) if query is None else as_rows(query)
    if len(ids) != rows:
        raise ValueError(f"query has {len(ids)} rows for {rows} streams")
    count = ids.shape[1]
    if lengths is not None:
        require_one_length(lengths, "query needs")
        require_ids(ids, lengths, model.config.vocab_size)
        if stored and on_host(state.seen).min() < count:
            raise ValueError(f"query has {count} tokens, and a stream has read {on_host(state.seen).min()}")
    width = max(count, 2)
    behind = count if stored or query is None else 0  # tokens of the query that the streams have read
    offset = np.arange(width) - (width - count) - behind
    context = ChunkContext(
        position=state.position[:, None] + jnp.asarray((offset % 2**32).astype(np.uint32)),
        valid=jnp.broadcast_to(jnp.arange(width) >= width - count, (rows, width)),
        seen=state.seen + int(offset[0]),
        span=state.span,
        implementation="xla",
        shared=state.shared,
    )
    return jnp.asarray(np.pad(ids, ((0, 0), (width - count, 0))), jnp.int32), context


@jax.jit
def embedded(model: Decoder, tokens: Int[Array, "B C"]) -> Float[Array, "B C E"]:
    return model.embed(tokens)


@partial(jax.jit, static_argnames="work")
def layer_read(
    block: Block,
    row: int | Array | None,
    x: Float[Array, "B C E"],
    state: State,
    context: ChunkContext,
    work: Cache,
) -> tuple[Float[Array, "B C E"], State]:
    """One layer: what its queries read, and what the work makes of its state. `row`: which, in a stack of layers."""
    block = layer_of(block, row)
    x, state, _ = block.stream(x, state, work, context)
    return x, state


@partial(jax.jit, static_argnames="cache")
def passed(
    block: Block,
    row: int | Array | None,
    x: Float[Array, "B C E"],
    state: State,
    context: ChunkContext,
    cache: Recurrence,
) -> Float[Array, "B C E"]:
    """What a recurrent layer makes of tokens that come next; padding in front of a single one is not read."""
    block = layer_of(block, row)
    padding = jnp.sum(~context.valid[0])
    moved = dataclasses.replace(context, valid=jnp.roll(context.valid, -padding, 1))
    y = block.stream(jnp.roll(x, -padding, 1), state, cache, moved)[0]
    return jnp.roll(y, padding, 1)
