"""Stretches of a stream read layer by layer: one program for all equal layers, so that depth costs nothing to compile.

A step is one program with every layer in it, and compilers take time in proportion. Here the host calls a program a
layer, over some chunks at a time, and layers with equal shapes and equal caches share it. Nothing is copied: each call
gets the weights and the donated cache of its own layer. The order is exact: a layer reads a chunk when the layer below
has read it, and its own cache holds all chunks before.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from streamjax.host_programs import program
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.head_groups import HeadGroups
from streamjax.kv.pages.page_pool import PageTables
from streamjax.kv.query import Implementation, State
from streamjax.models.decoder import Block, Decoder
from streamjax.models.layer_stacking import layer_of, without_layers
from streamjax.models.mixers.attention import ChunkContext
from streamjax.models.mixers.handed_on.learned_bounds import with_bounds
from streamjax.parallel.rules import constrain, map_state_axes
from streamjax.streaming.by_layer.grouped_heads import read_grouped, shares_parts
from streamjax.streaming.by_layer.in_turn import Places, in_turn
from streamjax.streaming.state import SEEN_LIMIT, StreamState
from streamjax.streaming.step import enter, leave, surprise


@program()
def embedded(
    ends: Decoder, state: StreamState, tokens: Int32[Array, "N B C"], count: Int32[Array, "N B"]
) -> tuple[Float[Array, "N B C E"], Places]:
    """What the first layer reads of N chunks, and where their tokens stand. No layers in `ends` nor in `state`."""

    def one(state: StreamState, x: tuple[Array, Array]) -> tuple[StreamState, tuple[Array, tuple]]:
        tokens, count = x
        context, tokens = enter(state, tokens, count)
        moved = dataclasses.replace(
            state,
            position=state.position + count.astype(jnp.uint32),
            seen=jnp.minimum(state.seen + count, SEEN_LIMIT),
        )
        return moved, (ends.embed(tokens), (context.position, context.valid, context.seen, context.ids))

    x, places = in_turn(one, state, (tokens, count))[1]
    return x, Places(*places)


@program(donate_argnames="state")
def looked_ahead(
    block: Block,
    row: int | Int32[Array, ""] | None,
    x: Float[Array, "N B C E"],
    state: State,
    valid: Bool[Array, "N B C"],
) -> State:
    """The state of one layer when it has looked at N chunks of a prefix, of which it has read none yet."""
    block = layer_of(block, row)
    return in_turn(lambda state, chunk: (block.look_ahead(chunk[0], state, chunk[1]), None), state, (x, valid))[0]


@program(static_argnames=("cache", "span", "implementation"), donate_argnames="state")
def layer_over(
    block: Block,
    row: int | Int32[Array, ""] | None,
    x: Float[Array, "N B C E"],
    state: State,
    places: Places,
    cache: Cache,
    span: int,
    implementation: Implementation | None,
    head_order: Int32[Array, " K"] | None = None,
    tables: PageTables | None = None,
    shared: tuple[State, ...] | None = None,
) -> tuple[Float[Array, "N B C E"], State]:
    """One layer over N chunks: its outputs and its new state.

    `row`: which layer, where `block` is a stack of them. `head_order`, `tables`, `shared`: see `ChunkContext`.
    """
    block = layer_of(block, row)

    def one(state: State, chunk: tuple) -> tuple[State, Array]:
        x, position, valid, seen, ids = chunk
        context = ChunkContext(
            position,
            valid,
            seen,
            span,
            ids=ids,
            implementation=implementation,
            head_order=head_order,
            tables=tables,
            shared=shared,
        )
        x, state, _ = block.stream(x, state, cache, context)
        return map_state_axes(lambda leaf, axes: constrain(leaf, *axes), state), x

    state, x = in_turn(one, state, (x, *places))
    return x, state


@program(donate_argnames="state", static_argnames="scored")
def finished(
    ends: Decoder,
    state: StreamState,
    x: Float[Array, "N B C E"],
    tokens: Int32[Array, "N B C"],
    count: Int32[Array, "N B"],
    scored: bool,
) -> tuple[StreamState, Float[Array, "N B C"] | None]:
    """Where the streams stand behind N chunks of which `x` are the last layer's outputs; nats a token if `scored`."""

    def one(state: StreamState, chunk: tuple[Array, Array, Array]) -> tuple[StreamState, Array | None]:
        x, tokens, count = chunk
        new, hidden = leave(state, ends.norm(x), tokens, count)
        return new, surprise(ends, state, hidden, tokens, count) if scored else None

    return in_turn(one, state, (x, tokens, count))


def read_layerwise(
    model: Decoder,
    state: StreamState,
    tokens: Int32[Array, "N B C"],
    count: Int32[Array, "N B"],
    *,
    scored: bool = False,
    ahead: bool = False,
) -> tuple[StreamState, Float[Array, "N B C"] | None]:
    """Read N chunks; the state is donated. For models in which no layer reads what another one remembers.

    ahead: layers that can look at all of them before they read the first (`PrefixLinearConfig`).
    """
    model = with_bounds(model)
    ends, layers = without_layers(model), list(state.layers)
    standing = dataclasses.replace(state, layers=())
    x, places = embedded(ends, standing, tokens, count)
    for i, cache in enumerate(state.caches):
        block, row = model.layer_and_row(i)
        if ahead:
            layers[i] = looked_ahead(block, row, x, layers[i], places.valid)
        if isinstance(cache, HeadGroups) and shares_parts(block, cache, state):
            x, layers[i] = read_grouped(block, row, x, layers[i], places, cache, state.span, state.implementation)
            continue
        group = cache.borrows if isinstance(cache, Cascade) else None
        shared = None if group is None or state.shared is None else (state.shared[group],)
        cache, heads = cache.renumbered()  # layers whose groups of heads have equal sizes share a program
        order = None if heads is None else jnp.array(heads, jnp.int32)
        options = cache, state.span, state.implementation, order, state.tables, shared
        x, layers[i] = layer_over(block, row, x, layers[i], places, *options)
    standing, nats = finished(ends, standing, x, tokens, count, scored)
    return dataclasses.replace(standing, layers=tuple(layers)), nats
