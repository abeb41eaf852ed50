"""The rows' next tokens and a chunk of a prompt in the same programs, so that each weight is read once for both.

Apart, an iteration multiplies every weight by the rows' tokens and then by the chunk's. Decoding waits for memory and
reading for arithmetic, so rows that ride along with a chunk cost little (SARATHI, 2308.16369). Attention to each
stream's own cache stays apart (`serving.joint_products`). As where a long stretch is read (`streaming.by_layer`), there
is one program for all equal layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from streamjax.kv.cache import Cache
from streamjax.kv.query import Implementation, State
from streamjax.models.decoder import Block, Decoder
from streamjax.models.layer_stacking import layer_of, without_layers
from streamjax.models.mixers.attention import ChunkContext
from streamjax.models.mixers.handed_on.learned_bounds import with_bounds
from streamjax.parallel.rules import constrain, map_state_axes
from streamjax.serving.decoding import Drawn, draw, first_sampling, no_choices, noted, of_all_rows, put_choice
from streamjax.serving.joint_products import jointly
from streamjax.serving.row_sampling import RowSampling
from streamjax.serving.row_states import first_rows, with_first_rows
from streamjax.streaming.by_layer.in_turn import Places
from streamjax.streaming.by_layer.layerwise import embedded, finished
from streamjax.streaming.state import StreamState
from streamjax.streaming.step import leave


def can_be_fused(model: Decoder, rows: StreamState, stream: StreamState) -> bool:
    """Whether `decode_and_read` serves a model and its streams: each layer keeps what it has to itself."""
    apart = (state.tables is None and state.shared is None for state in (rows, stream))
    return model.by_layers and all(apart)


def decode_and_read(
    model: Decoder,
    rows: StreamState,
    sampling: RowSampling,
    active: Bool[np.ndarray, " B"],
    width: int,
    stream: StreamState,
    tokens: Int32[Array, "1 C"],
    count: Int32[Array, " 1"],
) -> tuple[StreamState, RowSampling, Drawn, StreamState]:
    """Draw and read a token of each row that is `active`, and read a chunk of another stream beside them.

    What `decode_rows` and `read_chunk` do, but for the last bits. Only the first `width` rows are computed: the others
    are not active. Both states are donated.
    """
    model = with_bounds(model)
    ends = without_layers(model)
    standing = dataclasses.replace(rows, layers=()), dataclasses.replace(stream, layers=())
    sampling, drawn, drew, alive, few = _drawn(ends, standing[0], sampling, active, width)
    given = (drew[None], alive[None]), (tokens[None], count[None])
    row_x, row_places = embedded(ends, few, *given[0])
    x, places = embedded(ends, standing[1], *given[1])
    row_layers, layers = list(rows.layers), list(stream.layers)
    for i, both in enumerate(zip(rows.caches, stream.caches, strict=True)):
        block, row = model.layer_and_row(i)
        (row_cache, heads), (cache, _) = (one.renumbered() for one in both)
        order = None if heads is None else jnp.array(heads, jnp.int32)
        caches, spans = (row_cache, cache), (rows.span, stream.span)
        row_x, row_layers[i], x, layers[i] = layer_over_both(
            block,
            row,
            row_x,
            row_layers[i],
            row_places,
            x,
            layers[i],
            places,
            caches,
            spans,
            rows.implementation,
            order,
        )
    ahead = _finished(ends, standing[0], row_x, *given[0])
    standing_stream, _ = finished(ends, standing[1], x, *given[1], False)
    new_rows = dataclasses.replace(ahead, layers=tuple(row_layers))
    return new_rows, sampling, drawn, dataclasses.replace(standing_stream, layers=tuple(layers))


@partial(jax.jit, static_argnames="width", donate_argnames="sampling")
def _drawn(
    ends: Decoder, standing: StreamState, sampling: RowSampling, active: Bool[Array, " B"], width: int
) -> tuple[RowSampling, Drawn, Int32[Array, "W 1"], Int32[Array, " W"], StreamState]:
    """What rows draw: their sampling behind it, what the host gets, tokens and counts to read; and the first rows."""
    few, rows = first_rows(standing, width), first_sampling(sampling, width)
    logits = ends.logits(few.hidden[:, None])[:, 0]
    assert few.used is not None
    choice, alive, bad = draw(logits, rows, few.used, active[:width] & (rows.remaining > 0))
    chosen = put_choice(no_choices(rows, 1), choice, alive, jnp.int32(0))
    drawn = Drawn(*chosen, bad, jnp.zeros(bad.shape, jnp.int32), jnp.array(False))
    sampling, drawn = of_all_rows(sampling, noted(rows, choice.token, alive), drawn)
    return sampling, drawn, choice.token[:, None], alive.astype(jnp.int32), few


@partial(jax.jit, static_argnames=("caches", "spans", "implementation"), donate_argnames=("row_state", "state"))
def layer_over_both(
    block: Block,
    row: Int32[Array, ""] | None,
    row_x: Float[Array, "1 W 1 E"],
    row_state: State,
    row_places: Places,
    x: Float[Array, "1 1 C E"],
    state: State,
    places: Places,
    caches: tuple[Cache, Cache],
    spans: tuple[int, int],
    implementation: Implementation | None,
    head_order: Int32[Array, " K"] | None,
) -> tuple[Float[Array, "1 W 1 E"], State, Float[Array, "1 1 C E"], State]:
    """One layer over a token of each of the first W rows, and over a chunk of another stream."""
    width = row_x.shape[1]

    def axis(leaf: Any, axes: Any) -> int:
        return len(leaf.shape) - len(axes) + list(axes).index("batch")

    axes = map_state_axes(axis, row_state)
    few = jax.tree.map(lambda leaf, axis: jax.lax.slice_in_dim(leaf, 0, width, axis=axis), row_state, axes)

    def over(x: Array, state: State, places: Places, which: int) -> Callable[[Block], tuple[Array, State]]:
        position, valid, seen, ids = jax.tree.map(lambda leaf: leaf[0], places)
        options: dict[str, Any] = {"ids": ids, "implementation": implementation, "head_order": head_order}
        context = ChunkContext(position, valid, seen, spans[which], **options)

        def layer(block: Block) -> tuple[Array, State]:
            out, new, _ = block.stream(x[0], state, caches[which], context)
            return out[None], map_state_axes(lambda leaf, axes: constrain(leaf, *axes), new)

        return layer

    one, other = over(row_x, few, row_places, 0), over(x, state, places, 1)
    (row_x, few), (x, state) = jointly(layer_of(block, row), one, other)
    put = jax.lax.dynamic_update_slice_in_dim
    row_state = jax.tree.map(lambda leaf, part, axis: put(leaf, part, 0, axis), row_state, few, axes)
    return row_x, row_state, x, state


@partial(jax.jit, donate_argnames="standing")
def _finished(
    ends: Decoder,
    standing: StreamState,
    x: Float[Array, "1 W 1 E"],
    tokens: Int32[Array, "1 W 1"],
    count: Int32[Array, "1 W"],
) -> StreamState:
    """Where the rows stand behind their tokens."""
    few, _ = leave(first_rows(standing, x.shape[1]), ends.norm(x[0]), tokens[0], count[0])
    return with_first_rows(standing, few)
