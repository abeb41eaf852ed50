"""`compact`: at a caller's word, what streams hold is laid out anew by another cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.compaction import Compaction
from streamjax.kv.lazy_layers import NearShare
from streamjax.kv.tier import State
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window
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
    queries: Sequence[Rows] = (),
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
      queries: several such questions instead of `query`, each asked by itself; what they say counts together.
        `reconstruction` makes those of KVzip.

    Raises:
      ValueError: a cache whose tokens cannot be taken out, or into which they do not fit; a score that wants a query;
        rows that are not as described; a model with a chunk memory, or with a rotation that changes with the cache.
    """
    if model.config.hsa is not None:
        raise ValueError("a model with a chunk memory keeps it as it is: compact does not know it")
    if query is not None and queries:
        raise ValueError("give compact a query or several queries, not both")
    caches = layer_caches(model.config, cache)
    asked, stored = query is not None or bool(queries), stored and not queries
    works = [_compaction(old, new, asked, stored) for old, new in zip(state.caches, caches, strict=True)]
    span = max(new.span for new in caches)
    for i, layer in enumerate(model.config.blocks):
        rope, width = layer.mixer.rope, layer.mixer.head_dim
        if rope is not None and make_rotary(rope, width, span) != make_rotary(rope, width, state.span):
            raise ValueError(f"layer {i} rotates keys by what fits the cache: they cannot go to one of another span")
    seen = np.asarray(state.seen)
    end = min((new.capacity for new in caches if new.capacity is not None), default=None)
    if end is not None and seen.max() > end:
        raise ValueError(f"a stream has read {seen.max():,} tokens, and the new cache ends after {end:,}")
    said: list[Any] = [None] * len(works)
    for other in queries[:-1]:
        asking = [dataclasses.replace(work, more=True) for work in works]
        said = _through_layers(model, state, other, stored, asking, said)
    layers = _through_layers(model, state, queries[-1] if queries else query, stored, works, said)
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


def reconstruction(
    tokens: Rows, chunk: int = 2048, request: Sequence[int] = (), again: Sequence[int] | None = None, lead: int = 8
) -> list[np.ndarray]:
    """Queries that ask a model to repeat what it has read, chunk by chunk (KVzip, Kim et al., 2505.23416).

        sj.compact(model, state, sj.kv.preset("kvzip"), queries=sj.reconstruction(prompt, request=ids))

    Args:
      tokens: what was read, rows of one length.
      chunk: tokens that are repeated at a time.
      request: ids in front of the first chunk, such as "Repeat the previous context exactly."
      again: ids in front of the others, such as "Repeat the part of the previous context exactly, starting with";
        `request` where None.
      lead: tokens of the chunk before that follow `again`.

    Raises:
      ValueError: rows of several lengths or of none; a chunk of no tokens.
    """
    ids, lengths = as_rows(tokens)
    if not ids.shape[1] or (lengths != ids.shape[1]).any():
        raise ValueError(f"what is to be repeated needs rows of one length; they have {lengths.tolist()}")
    if chunk < 1 or lead < 0:
        raise ValueError(f"reconstruction: chunk is {chunk} and lead is {lead}: at least 1, and 0")
    found = []
    for start in range(0, ids.shape[1], chunk):
        words = request if start == 0 or again is None else again
        asks = np.broadcast_to(np.asarray(words, np.int64), (len(ids), len(words)))
        found.append(np.concatenate((asks, ids[:, max(start - lead, 0) : start + chunk]), axis=1))
    return found


def lazy_layers(
    model: Decoder,
    state: StreamState,
    query: Rows,
    *,
    threshold: float = 0.9,
    sinks: int = 4,
    window: int = 1024,
    stored: bool = True,
) -> tuple[Cache, ...]:
    """One cache a layer: sinks and a window where the layer looks at little else, and as it is in the others.

    SimLayerKV (Zhang et al., 2410.13846): a layer is lazy if the attention that the queries give to the first `sinks`
    and the newest `window` tokens is more than `threshold` of all, on average over heads, queries and streams. What
    comes back is for `compact`, or for `init_state` of other streams.

        state = sj.compact(model, state, sj.lazy_layers(model, state, prompt[:, -1:]))

    Args:
      model, state, query, stored: see `compact`; cascades alone are asked.
      threshold: in 0..1. The paper's: 0.9 for Llama 3, 0.65 for Llama 2, 0.8 for Mistral.
      sinks, window: what a lazy layer keeps. Keys of sinks stay at their true distance.

    Raises:
      ValueError: what `compact` refuses of a query; a threshold or sizes that make no sense.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"lazy_layers: threshold is {threshold}: it must be from 0 to 1, a share of attention")
    near = Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window))
    works = []
    for kept in state.caches:
        if not isinstance(kept, Cascade):
            raise ValueError(f"only cascades of tiers can be asked what their layer looks at, not {kept!r}")
        works.append(NearShare(kept, sinks, window, stored))
    shares = _through_layers(model, state, query, stored, works, [None] * len(works))
    lazy = [float(jnp.mean(share)) > threshold for share in shares]
    return tuple(near if is_lazy else kept for is_lazy, kept in zip(lazy, state.caches, strict=True))


def _through_layers(
    model: Decoder, state: StreamState, query: Rows | None, stored: bool, works: Sequence[Cache], said: Sequence[Any]
) -> list[Any]:
    """What each layer's work makes of its state, and of what was said before, when these queries read it."""
    tokens, context = _standing(model, state, query, stored)
    x, made = _embedded(model, tokens), []
    for i, (work, part, before) in enumerate(zip(works, state.layers, said, strict=True)):
        block, row = model.layer_and_row(i)
        x, new = _layer(block, row, x, (part, before), context, work)
        made.append(new)
    return made


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
    work: Cache,
) -> tuple[Float[Array, "B C E"], State]:
    """One layer: what its queries read, and what the work makes of its state. `row`: which, in a stack of layers."""
    if row is not None:
        block = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False), block)
    x, state, _ = block.stream(x, state, work, context)
    return x, state
