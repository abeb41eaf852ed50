"""`compact`: at a caller's word, what streams hold is laid out anew by another cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.compaction import Compaction
from streamjax.kv.tier import State
from streamjax.models.decoder import Block, Decoder
from streamjax.models.mixers.attention import ChunkContext
from streamjax.models.rope import make_rotary
from streamjax.streaming.rows import Rows, as_rows, require_ids
from streamjax.streaming.state import StreamState, layer_caches


def compact(
    model: Decoder,
    state: StreamState,
    cache: Cache | Sequence[Cache],
    query: Rows | None = None,
    *,
    stored: bool = True,
) -> StreamState:
    """The same streams under another cache, for instance at the end of a prompt or between two turns.

    Each tier of the new cache takes of all that is held what it keeps; a `Scored` tier makes one choice. So
    `compact(model, state, sj.kv.preset("snapkv", ...), query=prompt[:, -32:])` after reading a prompt into a `dense`
    cache is SnapKV as published. Positions stay; what a cache does not take is gone. The state is not donated.

    Scores that choose by attention need queries. States keep no queries, which would cost every stream memory that few
    ever use; the tokens in `query` are read again instead, from the old cache and without being stored, which over a
    dense cache gives the very same queries. `H2O` over a cache that has noted its attention needs none.

    Args:
      model: the model that read the streams.
      state: where they stand.
      cache: the new cache, for all layers or one a layer; layers with windows of their own keep those.
      query: ids of the tokens whose attention decides, one row a stream, all of one length.
      stored: the queries are the newest tokens that the streams have read; otherwise tokens that would come next, such
        as a question about what was read.

    Raises:
      ValueError: a cache whose tokens cannot be taken out, or into which they do not fit; a score that wants a query;
        rows that are not as described; a model with a chunk memory, or with a rotation that changes with the cache.
    """
    if model.config.hsa is not None:
        raise ValueError("a model with a chunk memory keeps it as it is: compact does not know it")
    caches = layer_caches(model.config, cache)
    works = [_compaction(old, new, query is not None, stored) for old, new in zip(state.caches, caches, strict=True)]
    span = max(new.span for new in caches)
    for i, layer in enumerate(model.config.blocks):
        if layer.mixer.recurrent:
            continue
        rope, width = layer.attention.rope, layer.attention.head_dim
        if rope is not None and make_rotary(rope, width, span) != make_rotary(rope, width, state.span):
            raise ValueError(f"layer {i} rotates keys by what fits the cache: they cannot go to one of another span")
    seen = np.asarray(state.seen)
    end = min((new.capacity for new in caches if new.capacity is not None), default=None)
    if end is not None and seen.max() > end:
        raise ValueError(f"a stream has read {seen.max():,} tokens, and the new cache ends after {end:,}")
    tokens, context = _standing(model, state, query, stored)
    x, layers = _embedded(model, tokens), []
    for i, (work, part) in enumerate(zip(works, state.layers, strict=True)):
        block, row = model.layer_and_row(i)
        x, new = _layer(block, row, x, part, context, work)
        layers.append(new)
    # What is as it was is copied: both states can be read on, and reading consumes a state.
    kept = jax.tree.map(jnp.copy, dataclasses.replace(state, layers=()))
    layers = [jax.tree.map(jnp.copy, x) if work.old == work.new else x for work, x in zip(works, layers, strict=True)]
    return dataclasses.replace(kept, layers=tuple(layers), caches=caches, span=span).placed()


def _compaction(old: Cache, new: Cache, asked: bool, stored: bool) -> Compaction:
    for cascade in (old, new):
        if not isinstance(cascade, Cascade):
            raise ValueError(f"only cascades of tiers are compacted, not {cascade!r}")
    assert isinstance(old, Cascade)
    assert isinstance(new, Cascade)
    return Compaction(old, new, asked, stored or not asked)


def _standing(
    model: Decoder, state: StreamState, query: Rows | None, stored: bool
) -> tuple[Int32[Array, "B C"], ChunkContext]:
    """The queries, at least two and padded in front, and where they stand.

    Raises:
      ValueError: rows that are no queries of these streams.
    """
    rows = state.batch_size
    ids, lengths = (np.zeros((rows, 0), np.int64), None) if query is None else as_rows(query)
    if len(ids) != rows:
        raise ValueError(f"query has {len(ids)} rows for {rows} streams")
    count = ids.shape[1]
    if lengths is not None:
        if not count or (lengths != count).any():
            raise ValueError(f"query needs rows of one length, of at least one token; they have {lengths.tolist()}")
        require_ids(ids, lengths, model.config.vocab_size)
        if stored and np.asarray(state.seen).min() < count:
            raise ValueError(f"query has {count} tokens, and a stream has read {np.asarray(state.seen).min()}")
    width = max(count, 2)
    behind = count if stored or query is None else 0  # tokens of the query that the streams have read
    offset = np.arange(width) - (width - count) - behind
    context = ChunkContext(
        position=state.position[:, None] + jnp.asarray((offset % 2**32).astype(np.uint32)),
        valid=jnp.broadcast_to(jnp.arange(width) >= width - count, (rows, width)),
        seen=state.seen + int(offset[0]),
        span=state.span,
        implementation="xla",
    )
    return jnp.asarray(np.pad(ids, ((0, 0), (width - count, 0))), jnp.int32), context


@jax.jit
def _embedded(model: Decoder, tokens: Int[Array, "B C"]) -> Float[Array, "B C E"]:
    return model.embed(tokens)


@partial(jax.jit, static_argnames="work")
def _layer(
    block: Block,
    row: int | Array | None,
    x: Float[Array, "B C E"],
    state: State,
    context: ChunkContext,
    work: Compaction,
) -> tuple[Float[Array, "B C E"], State]:
    """One layer: what its queries read, and its state by the new rule. `row`: which one, in a stack of layers."""
    if row is not None:
        block = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False), block)
    x, state, _ = block.stream(x, state, work, context)
    return x, state
