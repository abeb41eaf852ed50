"""A dense state out of others: their tokens at new places, and new tokens that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.layouts.rearrangement import Rearrangement, Source
from streamjax.kv.tiers.full import Full
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import ChunkContext
from streamjax.streaming.compacting.reading_layers import layer_read
from streamjax.streaming.state import StreamState, rotated_otherwise


class Taken(NamedTuple):
    """Tokens of a state by their index in it: which stay, and how far each is moved on."""

    state: StreamState
    keep: Bool[np.ndarray, " T"]
    by: Int[np.ndarray, " T"]


def dense_capacity(model: Decoder, state: StreamState, what: str) -> int:
    """Tokens that a dense state has room for.

    Raises:
      ValueError: a layer that does not keep everything, or streams of different lengths.
    """
    for i, cache in enumerate(state.caches):
        if not (isinstance(cache, Cascade) and len(cache.tiers) == 1 and isinstance(cache.tiers[0], Full)):
            raise ValueError(f"{what} needs every token in every layer, as sj.kv.preset('dense') keeps them: layer {i} "
                             f"has {cache!r}")  # fmt: skip
        if model.config.blocks[i].mixer.reach is not None:
            raise ValueError(f"{what} needs full attention in every layer: layer {i} has a window of its own")
    seen = np.asarray(state.seen)
    if len(set(seen.tolist())) > 1:
        raise ValueError(f"{what} needs streams of one length; they have read {seen.tolist()} tokens")
    capacity = state.capacity
    assert capacity is not None
    return capacity


def rearranged(
    model: Decoder,
    sources: Sequence[Taken],
    capacity: int,
    ids: Int[np.ndarray, "B C"],
    places: Int[np.ndarray, " C"],
) -> StreamState:
    """A dense state of `capacity` tokens with what is taken, and new tokens at these indices of it, in order.

    Raises:
      ValueError: more tokens than there is room for, or a rotation that changes with the capacity.
    """
    start, last = sources[0].state, sources[-1].state
    total = sum(int(source.keep.sum()) for source in sources) + len(places)
    if total > capacity:
        raise ValueError(f"there would be {total:,} tokens, and the cache ends after {capacity:,}")
    full = Full(capacity)
    cache = Cascade(full)
    if rotated_otherwise(model.config, cache.span, *(source.state.span for source in sources)) is not None:
        raise ValueError("keys are rotated by what fits the cache: give a capacity of the same size")
    rows, count = start.batch_size, len(places)
    first = start.position - start.seen.astype(jnp.uint32)
    width = max(count, 2)
    there = np.arange(width) >= width - count
    padded = np.pad(places, (width - count, 0))
    context = ChunkContext(
        position=first[:, None] + jnp.asarray(padded.astype(np.uint32)),
        valid=jnp.broadcast_to(jnp.asarray(there), (rows, width)),
        seen=jnp.full((rows,), int(places[0]) - (width - count) if count else 0, jnp.int32),
        span=cache.span,
        implementation="xla",
    )
    x, layers = model.embed(jnp.asarray(np.pad(ids, ((0, 0), (width - count, 0))), jnp.int32)), []
    tables = [(_of_slots(s, s.keep, bool), _of_slots(s, s.by % 2**32, np.uint32)) for s in sources]
    for i in range(model.config.num_layers):
        block, row = model.layer_and_row(i)
        own = tuple(Source(s.state.layers[i][0], *table) for s, table in zip(sources, tables, strict=True))
        work = Rearrangement(tuple(_full(s.state.caches[i]) for s in sources), full)
        x, new = layer_read(block, row, x, (first, own), context, work)
        layers.append((new,))
    newest = bool(count) and int(places[-1]) == total - 1
    return StreamState(
        layers=tuple(layers),
        position=first + jnp.uint32(total),
        seen=jnp.full((rows,), total, jnp.int32),
        hidden=model.norm(x)[:, -1] if newest else jnp.copy(last.hidden),
        caches=(cache,) * model.config.num_layers,
        span=cache.span,
        implementation=start.implementation,
    ).placed()


def _full(cache: Cache) -> Full:
    assert isinstance(cache, Cascade)
    (tier,) = cache.tiers
    assert isinstance(tier, Full)
    return tier


def _of_slots(source: Taken, values: np.ndarray, dtype: type) -> Array:
    """Numbers for each token as numbers for each slot of its state, the same in every row."""
    capacity = source.state.capacity
    assert capacity is not None
    padded: np.ndarray = np.pad(values.astype(dtype), (0, capacity - len(values)))
    return jnp.broadcast_to(jnp.asarray(padded), (source.state.batch_size, capacity))
