"""A chunk of a stream in two phases: its hidden states first, and the state behind it once it is known how much counts.

`advance` does both at once. Here the caches answer the chunk and stay as they are (`Cache.deferred`), so that what is
wrong leaves no trace in any of them. The second phase stores what the first has computed; no weight is read again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from streamjax.attention.token_tree import TokenTree
from streamjax.kv.cache import Cache, Waiting, along, take_in
from streamjax.kv.layer_caches.recurrence import BesideRecurrence
from streamjax.kv.layer_caches.slots_of import SlotsOf
from streamjax.kv.tiers.landmark_memory import ChunkMemory
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.handed_on.learned_bounds import with_bounds
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import advance, check_rows, enter, leave, nan_beyond_capacity

NO_TREES = (
    "prompt tokens are read as trees, which this model or its cache does not take: train heads (--kind=hydra), "
    "or use --draft=ngram"
)


def look_ahead(
    model: Decoder, state: StreamState, tokens: Int[Array, "B C"], count: Int32[Array, " B"]
) -> tuple[Float[Array, "B C E"], tuple[Any, ...]]:
    """Hidden states of a chunk, as `advance` gives them, and what each layer has waiting for `take_in_first`."""
    check_rows(state, tokens.shape[0])
    if model.config.hsa is not None:  # an encoder makes a memory of whole pages: it reads the chunk again
        return advance(model, state, tokens, count)[1], ()
    context, tokens = enter(state, tokens, count)
    caches = [cache.deferred(one_by_one=True) for cache in state.caches]
    hidden, waiting = model.stream(tokens, state.layers, caches, context)
    return leave(state, hidden, tokens, count)[1], waiting


def look_ahead_in_tree(
    model: Decoder,
    state: StreamState,
    tokens: Int[Array, "B N"],
    tree: TokenTree,
    embedded: Float[Array, "B N W"] | None = None,
    differentiable: bool = False,
) -> tuple[Float[Array, "B N E"], tuple[Any, ...]]:
    """Hidden states of the nodes of a tree, each as if the stream had gone on with those above it, and what waits.

    `waiting_along` makes of that what `take_in_first` takes. The tree must have no more levels than
    `allowed_levels` says. `embedded`: what the first layer reads of the tokens, if not their embeddings.
    """
    check_rows(state, tokens.shape[0])
    context, tokens = enter(state, tokens, None, differentiable, tree)
    caches = [cache.deferred() for cache in state.caches]
    hidden, waiting = model.stream(tokens, state.layers, caches, context, embedded=embedded)
    return nan_beyond_capacity(state, hidden, tree.depth), waiting


def waiting_along(waiting: tuple[Any, ...], path: Int32[Array, "B D"]) -> tuple[Any, ...]:
    """Of what each layer has waiting of a tree, the nodes of one path of each row, as if they had been a chunk."""

    def on_path(part: Any) -> Any:
        if isinstance(part, Waiting):
            return along(part, path)
        if isinstance(part, tuple):
            return tuple(map(on_path, part))
        return jnp.take_along_axis(part, path[:, :, None], axis=1, mode="clip")

    return tuple(map(on_path, waiting))


def takes_trees(model: Decoder, caches: Sequence[Cache]) -> bool:
    """Whether guesses may be a tree. An encoder makes a chunk memory of tokens in their order, and so does a bank.

    Nor where caches change with every token: what the ways of a tree see is then not the same.
    """
    return model.config.hsa is None and model.remembered is None and all(cache.alters_every != 1 for cache in caches)


def allowed_levels(state: StreamState, levels: int) -> Int32[Array, " B"]:
    """How many levels of a tree, of so many at most, each stream may be asked at once.

    Some caches choose what goes after so many tokens. What they would choose depends on the path.
    """
    allowed = jnp.full((state.batch_size,), levels, jnp.int32)
    for cache, own in zip(state.caches, state.layers, strict=True):
        if (most := cache.levels(own)) is not None:
            allowed = jnp.minimum(allowed, most)
    return jnp.maximum(allowed, 1)


def take_in_first(
    model: Decoder,
    state: StreamState,
    waiting: tuple[Any, ...],
    hidden: Float[Array, "B C E"],
    tokens: Int[Array, "B C"],
    count: Int32[Array, " B"],
) -> StreamState:
    """The state behind the first `count` tokens of each row of a chunk that `look_ahead` was given, at least as many.

    It is the state that `advance` would have made of these tokens alone.
    """
    if model.config.hsa is not None:
        return advance(model, state, tokens, count)[0]
    model, (context, tokens) = with_bounds(model), enter(state, tokens, count)
    layers: list[Any] = []
    for i, (cache, own, chunk) in enumerate(zip(state.caches, state.layers, waiting, strict=True)):
        block = model.layer(i)
        if isinstance(block.mixer, RecurrentMixer):
            layers.append(block.mixer.recur(chunk, own, context.valid)[1])
        elif isinstance(cache, SlotsOf):
            layers.append(own)
        elif isinstance(cache, BesideRecurrence):
            assert block.beside is not None
            beside = block.beside.recur(chunk[1], own[1], context.valid)[1]
            layers.append((take_in(cache.attention, own[0], chunk[0], context.valid, one_by_one=True), beside))
        else:
            layers.append(take_in(cache, own, chunk, context.valid, one_by_one=True))
    return leave(dataclasses.replace(state, layers=tuple(layers)), hidden, tokens, count)[0]


def harmless(model: Decoder, state: StreamState, given: Int32[Array, " B"]) -> Int32[Array, " B"]:
    """How many of the tokens that each row is given may be read ahead: guesses must not change what others see.

    They do in two places. A token does not see a page of a chunk memory that later tokens of its chunk push out, so a
    chunk that holds guesses completes no page. And where layers read more than their own cache, a memory or a bank, no
    copy of a cache can take the tokens in one by one.
    """
    apart = model.config.hsa is None and model.remembered is None
    for cache, own in zip(state.caches, state.layers, strict=True):
        if isinstance(cache, ChunkMemory):
            given = jnp.minimum(given, jnp.maximum(cache.size - own[1].filled - 1, 1))
        if not apart and cache.alters_every is not None:
            given = jnp.minimum(given, cache.unaltered(own))
    return given
