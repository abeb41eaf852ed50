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

from streamjax.kv.recurrence import Recurrence, RecurrentState
from streamjax.models.block import Block
from streamjax.models.config import MixerConfig
from streamjax.models.config.recurrent import RecurrentConfig
from streamjax.models.mixers.attention import SequenceContext
from streamjax.parallel.rules import constrain
from streamjax.training.backprop.sequence_chunks import ChunkedSequence
from streamjax.training.backprop.storage.kv_store import KeyStore
from streamjax.training.backprop.trainable_parameters import combine


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
    ) -> tuple[Float[Array, "B C E"], RecurrentState]:
        """The layer's output for chunk i, and `states` with the one behind it."""
        y, new = self._recur(block, x, _read(states, row, i), sequence.context(i))
        return y, _write(states, new, row, i + 1)

    def _recur(
        self, block: Block, x: Array, state: RecurrentState, context: SequenceContext
    ) -> tuple[Array, RecurrentState]:
        return (block.recur_beside if self.beside else block.recur)(x, state, context)

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
    ) -> tuple[Block, Float[Array, "B C E"], RecurrentState]:
        """Chunk i back through the layer: gradient of `params`, cotangents of `x` and of the state in front of it."""
        return self.output_and_vjp(params, rest, x, states, row, i, sequence)[1](d_y, d_states)

    def output_and_vjp(
        self,
        params: Block,
        rest: Block,
        x: Float[Array, "B C E"],
        states: RecurrentState,
        row: Any,
        i: Any,
        sequence: ChunkedSequence,
    ) -> tuple[Float[Array, "B C E"], Callable[[Array, RecurrentState], tuple[Block, Array, RecurrentState]]]:
        """The output for chunk i, and `backward` as a function of `d_y` and `d_states`."""

        def recur(params: Block, x: Array, state: RecurrentState) -> tuple[Array, RecurrentState]:
            return self._recur(combine(params, rest), x, state, sequence.context(i))

        (y, new), vjp = jax.vjp(recur, params, x, _read(states, row, i))

        def back(d_y: Array, d_states: RecurrentState) -> tuple[Block, Array, RecurrentState]:
            behind = jax.tree.map(lambda d, like: d.astype(like.dtype), _read(d_states, row, 0), new)
            d_params, d_x, d_state = vjp((d_y, behind))
            return d_params, d_x, _write(d_states, d_state, row, 0)

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
