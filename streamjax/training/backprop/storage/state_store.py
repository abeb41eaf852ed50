"""Where chunked backprop keeps the states of recurrent layers, and their cotangents.

A chunk needs of those before it the state that they left. So the forward pass keeps the states at the borders of
chunks, and the backward pass computes all inside a chunk again behind the one in front of it. The cotangent of a state
comes from the chunk behind it alone: there is one for each layer, and every chunk takes it and leaves its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.attention.landmarks.page_attention import LandmarkPages
from streamjax.kv.layer_caches.recurrence import Recurrence, RecurrentState
from streamjax.models.block import Block
from streamjax.models.config import MixerConfig
from streamjax.models.config.recurrent import RecurrentConfig
from streamjax.parallel.rules import constrain
from streamjax.training.backprop.sequence_chunks import ChunkedSequence, add
from streamjax.training.backprop.storage import landmark_memory
from streamjax.training.backprop.storage.kv_store import KeyStore
from streamjax.training.backprop.trainable_parameters import combine

Back = Callable[[Array, RecurrentState], tuple[Block, Array, RecurrentState, LandmarkPages | None]]


@dataclasses.dataclass(frozen=True)
class StateStore:
    """Buffers for the states of layers with one kind of recurrent mixer: [R, S, B, ...] for S places of R layers.

    Of states S is `count + 1`, one in front of each of `count` chunks and one behind the last; of cotangents 1.
    `beside`: the mixer stands beside attention, and what is computed is its part of the layer alone.
    """

    mixer: RecurrentConfig
    count: int
    beside: bool = False

    def places(self, local: bool) -> int:
        """States of a layer that there is room for, or (`local`) cotangents."""
        return 1 if local else self.count + 1

    def empty(self, rows: int, batch: int, dtype: Any, local: bool) -> RecurrentState:
        """Zeros for the states of `rows` layers, or (`local`) for their cotangents."""
        one = Recurrence(self.mixer.state_shape, self.mixer.conv_shape).empty(batch, dtype)
        places = rows, self.places(local)

        def zeros(x: Array, axes: Any) -> Array:
            return constrain(jnp.zeros((*places, *x.shape), x.dtype), None, None, *axes)

        return one.map_axes(zeros)

    def forward(
        self,
        block: Block,
        x: Float[Array, "B C E"],
        states: RecurrentState,
        row: Any,
        i: Any,
        sequence: ChunkedSequence,
        memory: LandmarkPages | None = None,
    ) -> tuple[Float[Array, "B C V"], RecurrentState]:
        """The layer's output for chunk i, and `states` with the one behind it. memory: the pages that it reads."""
        y, new = self._recur(block, x, _read(states, row, i), memory, i, sequence)
        return y, _write(states, new, row, i + 1)

    def _recur(
        self,
        block: Block,
        x: Array,
        state: RecurrentState,
        memory: LandmarkPages | None,
        i: Any,
        sequence: ChunkedSequence,
    ) -> tuple[Array, RecurrentState]:
        context = sequence.context(i)
        if self.beside:
            return block.recur_beside(x, state, context)
        return block.recur(x, state, context, landmark_memory.view(memory, block, sequence, i))

    def backward(
        self,
        params: Block,
        rest: Block,
        x: Float[Array, "B C E"],
        d_y: Float[Array, "B C E"],
        states: RecurrentState,
        d_states: RecurrentState,
        row: Any,
        i: Any,
        sequence: ChunkedSequence,
        memory: LandmarkPages | None = None,
        d_memory: LandmarkPages | None = None,
    ) -> tuple[Block, Float[Array, "B C E"], RecurrentState, LandmarkPages | None]:
        """Chunk i back through the layer: gradient of `params`, cotangents of `x` and of the state in front of it.

        memory, d_memory: the chunk memory that the layer reads or makes, and its gradients, as in `chunk_vjp`.
        """
        block = combine(params, rest)
        read = None if block.reader is None else memory
        _, back = self.output_and_vjp(params, rest, x, states, row, i, sequence, read)
        d_params, d_x, d_states, d_pages = back(d_y, d_states)
        if d_pages is not None and d_memory is not None:
            d_memory = add(d_memory, d_pages)
        if block.encoder is not None and d_memory is not None:
            from_pages, d_x_pages = landmark_memory.encode_back(params, rest, x, d_memory, i)
            d_params, d_x = jax.tree.map(jnp.add, d_params, from_pages), d_x + d_x_pages
        return d_params, d_x, d_states, d_memory

    def output_and_vjp(
        self,
        params: Block,
        rest: Block,
        x: Float[Array, "B C E"],
        states: RecurrentState,
        row: Any,
        i: Any,
        sequence: ChunkedSequence,
        memory: LandmarkPages | None = None,
    ) -> tuple[Float[Array, "B C V"], Back]:
        """The output for chunk i, and a function of `d_y` and `d_states` that gives the gradient of `params`, the
        cotangents of `x` and of the state in front, and that of the pages that the layer reads."""

        def recur(params: Block, x: Array, state: RecurrentState, memory: LandmarkPages | None) -> tuple[Array, Any]:
            return self._recur(combine(params, rest), x, state, memory, i, sequence)

        (y, new), vjp = jax.vjp(recur, params, x, _read(states, row, i), memory)

        def back(d_y: Array, d_states: RecurrentState) -> tuple[Block, Array, RecurrentState, LandmarkPages | None]:
            behind = jax.tree.map(lambda d, like: d.astype(like.dtype), _read(d_states, row, 0), new)
            d_params, d_x, d_state, d_pages = vjp((d_y, behind))
            return d_params, d_x, _write(d_states, d_state, row, 0), d_pages

        return y, back


Store = KeyStore | StateStore


def make_store(mixer: MixerConfig, chunk_size: int, count: int) -> Store:
    """Where layers with this mixer keep what `count` chunks of a sequence leave for later ones."""
    if isinstance(mixer, RecurrentConfig):
        return StateStore(mixer, count)
    return KeyStore.make(mixer, chunk_size, count)


def _index(x: Array, row: Any, place: Any) -> tuple[Array, ...]:
    return tuple(jnp.asarray(index, jnp.int32) for index in (row, place, *[0] * (x.ndim - 2)))


def _read(states: RecurrentState, row: Any, place: Any) -> RecurrentState:
    def get(x: Array) -> Array:
        return jax.lax.dynamic_slice(x, _index(x, row, place), (1, 1, *x.shape[2:]))[0, 0]

    return jax.tree.map(get, states)


def _write(states: RecurrentState, new: RecurrentState, row: Any, place: Any) -> RecurrentState:
    def put(x: Array, y: Array) -> Array:
        return jax.lax.dynamic_update_slice(x, y[None, None].astype(x.dtype), _index(x, row, place))

    return jax.tree.map(put, states, new)
