"""`side_by_side`: chunks that were read apart, all in front of a question at once (APE, Yang et al., 2502.05431)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from streamjax.kv.cascade import Cascade
from streamjax.kv.query import KVSpec, KVTokens, State, Stored
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.parallel import Parallel
from streamjax.models.decoder import Decoder
from streamjax.streaming.reuse.joining import EncodedChunk, require_one_prefix
from streamjax.streaming.state import StreamState, rotated_otherwise


def side_by_side(
    model: Decoder,
    chunks: Sequence[EncodedChunk],
    *,
    room: int = 1024,
    temperature: float = 0.9,
    scale: float = 0.9,
) -> StreamState:
    """Streams that stand behind all chunks at once: each directly behind the prefix, the question behind the longest.

    Nothing is computed. Attention to the chunks is sharpened by `temperature` and weighted by `scale`, which the paper
    searches for each model and task; see `sj.kv.Parallel`. Read the question next: there is no token to predict yet.

    Args:
      model: the model that read the chunks.
      chunks: in any order; their prefixes are the same.
      room: tokens to come, the question's and the answer's.
      temperature, scale: above 0.

    Raises:
      ValueError: no chunks, or of different prefixes; a rotation that changes with what fits the cache.

    Example:
      >>> texts = "Once upon a time", "there was a king"
      >>> chunks = [sj.encode_chunk(model, [tokenizer.encode(text)]) for text in texts]
      >>> state = sj.side_by_side(model, chunks, room=64)
      >>> state.capacity  # both chunks, which begin at one position, and the room
      96
    """
    prefix = require_one_prefix(chunks)
    if room < 1:
        raise ValueError(f"side_by_side: room is {room}: it must be at least 1 token to come")
    front, first = prefix.shape[1], chunks[0].state
    lengths = [chunk.tokens.shape[1] for chunk in chunks]
    tier, full = Parallel(sum(lengths), temperature, scale), Full(front + room)
    cache = Cascade(tier, full)
    if rotated_otherwise(model.config, cache.span, *(chunk.state.span for chunk in chunks)) is not None:
        raise ValueError("keys are rotated by what fits the cache: chunks of this model cannot stand side by side")
    layers = []
    for i in range(model.config.num_layers):
        held = [_stored(chunk.state, i) for chunk in chunks]
        apart = [_cut(part, front, front + length) for part, length in zip(held, lengths, strict=True)]
        joined = Stored(*(jnp.concatenate(parts, axis=2) for parts in zip(*(part[:4] for part in apart), strict=True)))
        rows, heads, _, width = joined.k.shape
        spec = KVSpec(rows, heads, width, joined.k.dtype, value_dim=joined.v.shape[-1])
        own: State = full.init(spec)
        if front:
            own = full.store(own, _tokens(_cut(held[0], 0, front)))
        layers.append((tier.given(spec, _tokens(joined)), own))
    position = first.position - jnp.uint32(lengths[0]) + jnp.uint32(max(lengths))
    return StreamState(
        layers=tuple(layers),
        position=position,
        seen=jnp.full((first.batch_size,), front + sum(lengths), jnp.int32),
        hidden=jnp.copy(chunks[int(np.argmax(lengths))].state.hidden),
        caches=(cache,) * model.config.num_layers,
        span=cache.span,
        implementation=first.implementation,
    ).placed()


def _stored(state: StreamState, layer: int) -> Stored:
    cache = state.caches[layer]
    assert isinstance(cache, Cascade)
    return cache.tiers[0].stored(state.layers[layer][0], None)


def _cut(part: Stored, start: int, stop: int) -> Stored:
    return Stored(*(x[:, :, start:stop] for x in (part.k, part.v, part.position, part.valid)))


def _tokens(part: Stored) -> KVTokens:
    return KVTokens(part.k, part.v, part.k, part.position, part.valid)
