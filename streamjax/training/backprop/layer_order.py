"""Chunked backprop with the layers outside and the chunks inside: StreamBP (2506.03077).

Of the forward pass only layers' inputs are kept, of every layer or of every `segment`-th. The backward pass walks the
layers from the last to the first. In a layer it computes the keys and values of all tokens once and walks the chunks
from the last to the first; of a chunk all else is computed again, used and forgotten. So what a layer computes inside,
the logits too, exist for one chunk at a time, and what grows with the sequence is the kept inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.partial import add_sinks
from streamjax.attention.landmark_attention import LandmarkPages
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.block import Block
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.training.backprop.chunk_attention import attend, attention_blocks
from streamjax.training.backprop.chunk_vjp import chunk_vjp
from streamjax.training.backprop.embedding_and_head import (
    assemble,
    embed_backward,
    finish_ends,
    output_backward,
    whole_ends,
)
from streamjax.training.backprop.gradient_options import GradientOptions
from streamjax.training.backprop.gradient_reduction import Reduction
from streamjax.training.backprop.sequence_chunks import ChunkedSequence, KVBuffer, add, chunk_at, whole_view, zeros_like
from streamjax.training.backprop.storage import landmark_memory
from streamjax.training.backprop.storage.activation_store import ActivationReader, ActivationStore, StoredActivations
from streamjax.training.backprop.storage.landmark_memory import Memories
from streamjax.training.backprop.storage.layer_stack import LayerStack, layer_stacks
from streamjax.training.backprop.storage.state_store import StateStore
from streamjax.training.backprop.trainable_parameters import combine
from streamjax.training.objectives.objective import Objective

Chunks = Float[Array, "N B C E"]


def layer_forward(
    block: Block,
    x: Chunks,
    sequence: ChunkedSequence,
    memory: LandmarkPages | None = None,
    known: bool = False,
) -> tuple[Chunks, LandmarkPages | None]:
    """A layer over all chunks; each output takes its input's place.

    `memory`: the pages that the layer reads. A layer that makes them fills them in, unless they are `known`.
    """
    if isinstance(block.mixer, RecurrentMixer):
        return recurrent_forward(block, x, sequence, memory, known)
    blocks = attention_blocks(block, sequence.chunk_size, sequence.block_k)

    def chunk(
        i: Any, carry: tuple[Chunks, KVBuffer, LandmarkPages | None, RecurrentState | None]
    ) -> tuple[Chunks, KVBuffer, LandmarkPages | None, RecurrentState | None]:
        x, buffer, memory, state = carry
        own, context, view = chunk_at(x, i), sequence.context(i), whole_view(sequence, i)
        q, k, v = block.project(own, context)
        buffer = buffer.write(k, v, 0, view.own)
        if block.encoder is not None and memory is not None and not known:
            memory = landmark_memory.write(memory, landmark_memory.encode(block, own), i)
        read = landmark_memory.view(memory, block, sequence, i)
        part = add_sinks(attend(block, blocks, q, buffer, view, context.segment_ids), block.attention.sinks())
        mixed = None
        if state is not None:
            mixed, state = block.recur_beside(own, state, context)
        y = block.combine(own, part.out, read, mixed)
        return jax.lax.dynamic_update_index_in_dim(x, y, i, 0), buffer, memory, state

    buffer = KVBuffer.zeros(block.mixer.config, 1, x.shape[1], sequence.slots, x.dtype)
    state = None if block.beside is None else block.beside.empty(x.shape[1], x.dtype)
    x, _, memory, _ = jax.lax.fori_loop(0, sequence.count, chunk, (x, buffer, memory, state))
    return x, memory


def layer_backward(
    params: Block,
    rest: Block,
    inputs: ActivationReader,
    d_y: Chunks,
    sequence: ChunkedSequence,
    options: GradientOptions,
    memory: LandmarkPages | None = None,
    d_memory: LandmarkPages | None = None,
) -> tuple[Block, Chunks, LandmarkPages | None]:
    """Gradient of a layer's trained parameters, and the cotangent of its input in the place of that of its output.

    `inputs` gives the chunks of the layer's input; `memory` are the pages that it reads or makes, and `d_memory` their
    gradients from the layers above, to which the layer's are added.
    """
    block = combine(params, rest)
    if isinstance(block.mixer, RecurrentMixer):
        return recurrent_backward(params, rest, inputs, d_y, sequence, options, memory, d_memory)
    blocks = attention_blocks(block, sequence.chunk_size, sequence.block_k)
    batch = d_y.shape[1]

    store = None if block.beside is None else StateStore(block.beside.config, sequence.count, True)

    def keys(i: Any, x: Array, made: tuple[KVBuffer, Any]) -> tuple[KVBuffer, Any]:
        (buffer, states), (k, v) = made, block.keys(x, sequence.context(i))
        states = None if store is None else store.forward(block, x, states, 0, i, sequence)[1]
        return buffer.write(k, v, 0, i * sequence.chunk_size), states

    empty = KVBuffer.zeros(block.mixer.config, 1, batch, sequence.slots, d_y.dtype)
    none = [None if store is None else store.empty(1, batch, d_y.dtype, local) for local in (False, True)]
    buffer, states = inputs.each(keys, (empty, none[0]))

    def chunk(
        i: Any, x: Array, carry: tuple[Any, Chunks, KVBuffer, LandmarkPages | None, Any]
    ) -> tuple[Any, Chunks, KVBuffer, LandmarkPages | None, Any]:
        total, d_y, grads, d_memory, d_states = carry
        view, mixed, back = whole_view(sequence, i), None, None
        if store is not None and states is not None:
            mixed, back = store.output_and_vjp(params, rest, x, states, 0, i, sequence)
        part, d_x, grads, d_memory, d_mixed = chunk_vjp(
            params,
            rest,
            blocks,
            x,
            chunk_at(d_y, i),
            sequence,
            i,
            lambda k, v: (buffer, view),
            grads,
            memory,
            d_memory,
            mixed,
        )
        if back is not None and d_mixed is not None:
            more, d_x_too, d_states, _ = back(d_mixed, d_states)
            part, d_x = jax.tree.map(jnp.add, part, more), d_x + d_x_too
        return add(total, part), jax.lax.dynamic_update_index_in_dim(d_y, d_x, i, 0), grads, d_memory, d_states

    grads = KVBuffer.zeros(block.mixer.config, 1, batch, sequence.slots, options.kv_grad_dtype)
    sums = zeros_like(params, options.grad_dtype)
    total, d_x, _, d_memory, _ = inputs.each_back(chunk, (sums, d_y, grads, d_memory, none[1]))
    return total, d_x, d_memory


def recurrent_forward(
    block: Block, x: Chunks, sequence: ChunkedSequence, memory: LandmarkPages | None = None, known: bool = False
) -> tuple[Chunks, LandmarkPages | None]:
    """`layer_forward` of a recurrent layer."""
    assert isinstance(block.mixer, RecurrentMixer)

    def chunk(
        i: Any, carry: tuple[Chunks, RecurrentState, LandmarkPages | None]
    ) -> tuple[Chunks, RecurrentState, LandmarkPages | None]:
        x, state, memory = carry
        own = chunk_at(x, i)
        if block.encoder is not None and memory is not None and not known:
            memory = landmark_memory.write(memory, landmark_memory.encode(block, own), i)
        read = landmark_memory.view(memory, block, sequence, i)
        y, state = block.recur(own, state, sequence.context(i), read)
        return jax.lax.dynamic_update_index_in_dim(x, y, i, 0), state, memory

    empty = block.mixer.empty(x.shape[1], x.dtype)
    x, _, memory = jax.lax.fori_loop(0, sequence.count, chunk, (x, empty, memory))
    return x, memory


def recurrent_backward(
    params: Block,
    rest: Block,
    inputs: ActivationReader,
    d_y: Chunks,
    sequence: ChunkedSequence,
    options: GradientOptions,
    memory: LandmarkPages | None = None,
    d_memory: LandmarkPages | None = None,
) -> tuple[Block, Chunks, LandmarkPages | None]:
    """`layer_backward` of a recurrent layer: the states at all chunks' borders first, then the chunks backwards."""
    block = combine(params, rest)
    assert isinstance(block.mixer, RecurrentMixer)
    store = StateStore(block.mixer.config, sequence.count)
    states, d_states = (store.empty(1, d_y.shape[1], d_y.dtype, local) for local in (False, True))
    states = inputs.each(lambda i, x, states: store.forward(block, x, states, 0, i, sequence, memory)[1], states)

    def chunk(
        i: Any, x: Array, carry: tuple[Block, Chunks, RecurrentState, LandmarkPages | None]
    ) -> tuple[Block, Chunks, RecurrentState, LandmarkPages | None]:
        total, d_y, d_states, d_memory = carry
        part, d_x, d_states, d_memory = store.backward(
            params, rest, x, chunk_at(d_y, i), states, d_states, 0, i, sequence, memory, d_memory
        )
        return add(total, part), jax.lax.dynamic_update_index_in_dim(d_y, d_x, i, 0), d_states, d_memory

    start = zeros_like(params, options.grad_dtype), d_y, d_states, d_memory
    total, d_x, _, d_memory = inputs.each_back(chunk, start)
    return total, d_x, d_memory


def rows_forward(
    rows: LayerStack, inputs: ActivationStore, x: Chunks, sequence: ChunkedSequence, remembered: Memories
) -> tuple[Chunks, StoredActivations]:
    """Output of some rows of layers, and what `inputs` keeps of the way. Memories are filled in."""

    def segment(s: Any, carry: tuple[Chunks, list[Array]]) -> tuple[tuple[Chunks, list[Array]], list[Array | None]]:
        x, here = carry
        here, away = inputs.keep(here, s, 0, x), [inputs.send(x)]

        def row(row: Any, carry: tuple[Chunks, list[Array]]) -> tuple[Chunks, list[Array]]:
            x, here = carry
            for position in range(rows.period):
                if position and inputs.every:  # then a segment is this row alone
                    here = inputs.keep(here, row, position, x)
                    away.append(inputs.send(x))
                x = place_forward(rows, sequence, remembered, False, row, position, x)
            return x, here

        return inputs.walk(s, row, (x, here)), away

    (x, here), away = rows.scan(inputs.segments, segment, (x, inputs.empty(x)))
    return x, StoredActivations(here, away)


def rows_backward(
    rows: LayerStack,
    inputs: ActivationStore,
    kept: StoredActivations,
    d_x: Chunks,
    sequence: ChunkedSequence,
    options: GradientOptions,
    remembered: Memories,
) -> tuple[list[Block], Chunks]:
    """Gradients of some rows of layers, and the cotangent of the first one's input."""
    d_remembered = landmark_memory.empty_memories(rows.config, sequence, options.kv_grad_dtype)

    def segment(s: Any, carry: tuple[list[Block], Chunks]) -> tuple[list[Block], Chunks]:
        inner = inputs.recompute(kept, s, partial(place_forward, rows, sequence, remembered, True))

        def row(row: Any, carry: tuple[list[Block], Chunks]) -> tuple[list[Block], Chunks]:
            grads, d_x = carry
            for position in reversed(range(rows.period)):
                chunks = inputs.reader(kept, inner, s, row, position)
                params, rest = rows.layer(row, position)
                source = rows.source(row)
                memory, d_memory = (None if source is None else m[source] for m in (remembered, d_remembered))
                new, d_x, d_memory = layer_backward(params, rest, chunks, d_x, sequence, options, memory, d_memory)
                if source is not None and d_memory is not None:
                    d_remembered[source] = d_memory
                grads = rows.put(grads, row, position, rows.finish_layer(new, row, position))
            return grads, d_x

        return inputs.walk_back(s, row, carry)

    return rows.loop_back(0, inputs.segments, segment, (rows.zero_grads(), d_x))


def place_forward(
    rows: LayerStack,
    sequence: ChunkedSequence,
    remembered: Memories,
    known: bool,
    row: Any,
    position: int,
    x: Chunks,
) -> Chunks:
    """The layer at a place of the rows over all chunks. It reads its memory in `remembered`, and fills in what it
    makes unless that is `known`."""
    source = rows.source(row)
    memory = None if source is None else remembered[source]
    x, memory = layer_forward(combine(*rows.layer(row, position)), x, sequence, memory, known)
    if source is not None and memory is not None:
        remembered[source] = memory  # models with memories are not stacked: this is Python's loop over layers
    return x


def loss_and_grad(
    model: Decoder,
    sequence: ChunkedSequence,
    objective: Objective,
    options: GradientOptions,
    split: Decoder | None,
    reduction: Reduction,
) -> tuple[Float[Array, ""], Decoder]:
    """Loss and gradient; see `backprop.loss_and_grad` for the arguments, `over_rows` for the last two."""
    ends = whole_ends(model, split, reduction)

    def embed(i: Any) -> Array:
        return ends.embed(chunk_at(sequence.tokens, i))

    groups = layer_stacks(model, options.trainable, split, reduction)
    x = jax.lax.map(embed, jnp.arange(sequence.count))
    remembered, held = landmark_memory.empty_memories(model.config, sequence, model.dtype), []
    for index, rows in enumerate(groups):
        away = round(options.offload_fraction * sequence.count) if options.offload else 0
        inputs = ActivationStore(rows, options.segment, embed if index == 0 else None, sequence.count, away)
        x, kept = rows_forward(rows, inputs, x, sequence, remembered)
        held.append((rows, inputs, kept))
    loss, d_output, d_x = output_backward(ends, options, x, sequence, objective)
    d_layers = []
    for rows, inputs, kept in reversed(held):
        grads, d_x = rows_backward(rows, inputs, kept, d_x, sequence, options, remembered)
        d_layers.append((rows, grads))
    d_ends = embed_backward(ends, options, d_output, d_x, sequence)
    return reduction.sum(loss), assemble(finish_ends(d_ends, split, reduction), d_layers)
