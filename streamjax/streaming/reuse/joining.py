"""`encode_chunk` and `join`: texts that are read once, each by itself, and put one behind another when they are asked.

Chunks of a store do not see each other when they are read, which is what makes them reusable and what is lost. Cache-
Craft (Agarwal et al., 2502.15734) gets it back by reading a share of each chunk's tokens again, over all in front.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int64

from streamjax.kv.cascade import Cascade
from streamjax.kv.tiers.full import Full
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import SequenceContext
from streamjax.streaming.reuse.rearranging import Taken, dense_capacity, rearranged
from streamjax.streaming.scan import read
from streamjax.streaming.state import StreamState, init_state
from streamjax.streaming.token_rows import Rows, as_rows


@dataclasses.dataclass(frozen=True)
class EncodedChunk:
    """Tokens that were read behind a prefix which all chunks share; `state` has both.

    tokens, prefix: ids, one row a stream.

    Example:
      >>> chunk = sj.encode_chunk(model, prompt, prefix=[[1, 2]])
      >>> chunk.tokens.shape, chunk.prefix.shape, chunk.state.seen.tolist()
      ((1, 16), (1, 2), [18])
    """

    tokens: Int64[np.ndarray, "B T"]
    prefix: Int64[np.ndarray, "B P"]
    state: StreamState


def encode_chunk(
    model: Decoder, tokens: Rows, prefix: Rows | None = None, *, chunk_size: int = 512, dtype: DTypeLike | None = None
) -> EncodedChunk:
    """Read a chunk of text by itself, to be joined with others as often as they are needed.

    Args:
      model: the model.
      tokens: ids, one row a stream, all of one length of at least one token.
      prefix: what stands in front of all chunks, such as BOS and instructions; nothing where None.
      chunk_size: tokens that are read at a time.
      dtype: of keys and values; the model's activation dtype where None.

    Raises:
      ValueError: rows that are not as described, ids that the model does not have, or layers with windows of their own.

    Example:
      >>> chunk = sj.encode_chunk(model, [tokenizer.encode("Once upon a time")])
      >>> chunk.state.seen.tolist()
      [16]
    """
    ids, lengths = as_rows(tokens)
    front, in_front = (np.zeros((len(ids), 0), np.int64), 0) if prefix is None else as_rows(prefix)
    if not ids.shape[1] or (lengths != ids.shape[1]).any() or np.any(in_front != front.shape[1]):
        raise ValueError("a chunk and its prefix need rows of one length, of at least one token of the chunk")
    if len(front) != len(ids):
        raise ValueError(f"the prefix has {len(front)} rows, and the chunk {len(ids)}")
    whole = np.concatenate((front, ids), axis=1)
    state = init_state(model, Cascade(Full(whole.shape[1])), len(ids), dtype=dtype)
    dense_capacity(model, state, "a chunk to be joined")
    return EncodedChunk(ids.astype(np.int64), front.astype(np.int64), read(model, state, whole, chunk_size))


def join(
    model: Decoder, chunks: Sequence[EncodedChunk], *, recompute: float = 0.0, capacity: int | None = None
) -> StreamState:
    """The streams that the chunks make, one behind another behind their prefix, in a dense cache.

    Keys turn to their new places, exactly. With `recompute` that share of the tokens of every chunk but the first is
    read again over all that stands in front of it: those whose values in the second layer would change most (as in
    CacheBlend, 2405.16444; Cache-Craft chooses by attention that it noted elsewhere). With `recompute=1` the state is
    that of reading everything in order.

    Args:
      model: the model that read the chunks.
      chunks: in order; their prefixes are the same.
      recompute: share of tokens that are read again, in 0..1.
      capacity: of the new state, tokens to come included; as many as there are where None.

    Raises:
      ValueError: no chunks, or of different prefixes or rows; a share outside 0..1; too little room.

    Example:
      >>> texts = "Once upon a time", "there was a king"
      >>> chunks = [sj.encode_chunk(model, [tokenizer.encode(text)]) for text in texts]
      >>> state = sj.join(model, chunks, recompute=0.15, capacity=128)
      >>> state.seen.tolist()  # 16 tokens of each; the question comes next
      [32]
    """
    prefix = require_one_prefix(chunks)
    if not 0 <= recompute <= 1:
        raise ValueError(f"join: recompute is {recompute}: it must be from 0 to 1, a share of tokens")
    front, offset, sources = prefix.shape[1], 0, []
    ids = np.concatenate((prefix, *(chunk.tokens for chunk in chunks)), axis=1)
    again = [] if recompute == 0 else _to_read_again(model, chunks, ids, recompute)
    for i, chunk in enumerate(chunks):
        place = np.arange(front + chunk.tokens.shape[1])
        keep = (place >= (front if i else 0)) & ~np.isin(place + offset, again)
        sources.append(Taken(chunk.state, keep, np.full(len(place), offset)))
        offset += chunk.tokens.shape[1]
    places = np.asarray(again, np.int64)
    return rearranged(model, sources, capacity or ids.shape[1], ids[:, places], places)


def require_one_prefix(chunks: Sequence[EncodedChunk]) -> np.ndarray:
    """The prefix of all chunks.

    Raises:
      ValueError: there are no chunks, or they have different prefixes or numbers of rows.
    """
    if not chunks:
        raise ValueError("there must be at least one chunk: sj.encode_chunk(model, ids) makes them")
    prefix = chunks[0].prefix
    if not all(np.array_equal(chunk.prefix, prefix) for chunk in chunks):
        raise ValueError("the chunks were read behind different prefixes: their tokens do not stand at equal places")
    return prefix


def _to_read_again(model: Decoder, chunks: Sequence[EncodedChunk], ids: np.ndarray, share: float) -> list[int]:
    """Indices of the tokens, of every chunk but the first, whose values in the second layer change most."""
    if any(layer.mixer.temperature is not None for layer in model.config.blocks if hasattr(layer.mixer, "temperature")):
        raise ValueError("queries of this model depend on their place in a run of tokens: join with recompute=0")
    layer, context = min(1, model.config.num_layers - 1), SequenceContext.from_start(*ids.shape)
    x = model.embed(jnp.asarray(ids, jnp.int32))
    for i in range(layer):
        x, _ = model.layer(i).parallel(x, context)
    *_, v = model.layer(layer).project(x, context)
    front, end, found = chunks[0].prefix.shape[1], chunks[0].prefix.shape[1] + chunks[0].tokens.shape[1], []
    for chunk in chunks[1:]:
        length = chunk.tokens.shape[1]
        old = jnp.swapaxes(chunk.state.layers[layer][0].v, 1, 2)[:, front : front + length]
        change = np.asarray(jnp.sum(jnp.square((v[:, end : end + length] - old).astype(jnp.float32)), axis=(0, 2, 3)))
        found += sorted(end + np.argsort(-change, kind="stable")[: math.ceil(share * length)])
        end += length
    return [int(place) for place in found]
