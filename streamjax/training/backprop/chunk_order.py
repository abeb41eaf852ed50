"""Chunked backprop with the chunks outside and the layers inside: the state forwards, its cotangent backwards.

The forward pass reads the sequence chunk by chunk, as a stream is read, and keeps the keys and values of every layer
(of one with a window, those that the next chunk sees).
The backward pass walks the chunks from the last to the first: it computes all layers of one chunk again from its tokens
and the kept keys and values, takes the loss and pulls its gradient back through the layers, while the gradient of keys
and values is carried from chunk to chunk. Per token and layer that is 2 K D numbers kept and as many carried; of a
layer with a window W, W / C of these kept, and only the window's carried. Of a recurrent layer its state in front of
each chunk is kept, and the cotangent of one is carried. It wins where windows are shorter than chunks, layers are
recurrent, or K D is small against the model's width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator, add_sink_logits
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.block import Block
from streamjax.models.decoder import Decoder
from streamjax.training.backprop.chunk_attention import attend
from streamjax.training.backprop.embedding_and_head import (
    assemble,
    embed_vjp,
    embed_zeros,
    finish_ends,
    loss_and_vjp,
    objective_of_chunks,
    output_zeros,
    stats_of,
    sum_of_ends,
    whole_ends,
)
from streamjax.training.backprop.gradient_options import GradientOptions
from streamjax.training.backprop.gradient_reduction import Reduction
from streamjax.training.backprop.layer_passes import chunk_vjp
from streamjax.training.backprop.sequence_chunks import ChunkedSequence, KVBuffer, add, chunk_at
from streamjax.training.backprop.storage import landmark_memory
from streamjax.training.backprop.storage.landmark_memory import Memories
from streamjax.training.backprop.storage.layer_stack import LayerStack, layer_stacks
from streamjax.training.backprop.storage.state_store import StateStore, Store, make_store
from streamjax.training.backprop.trainable_parameters import combine
from streamjax.training.objectives.objective import Objective, TokenStats

Chunk = Float[Array, "B C E"]


class Held(NamedTuple):
    """Keys of layers or their states, and the states of recurrent mixers beside attention."""

    own: KVBuffer | RecurrentState
    beside: RecurrentState | None = None


# Of stacked rows one a position, all rows in it; of single layers one a layer.
Buffers = list[Held]


class LayerGroup(NamedTuple):
    """Some rows of layers, and the stores of their keys or states, one a buffer, and of the states beside keys."""

    rows: LayerStack
    stores: list[Store]
    beside: list[StateStore | None]

    @classmethod
    def make(cls, rows: LayerStack, sequence: ChunkedSequence) -> LayerGroup:
        places = range(rows.period) if rows.stacked else range(rows.count)
        specs = [rows.block_config(0, place) if rows.stacked else rows.block_config(place, 0) for place in places]
        return cls(
            rows,
            [make_store(spec.mixer, sequence.chunk_size, sequence.count) for spec in specs],
            [None if spec.beside is None else StateStore(spec.beside, sequence.count, True) for spec in specs],
        )

    def place(self, row: Any, position: int) -> tuple[int, Any]:
        """Which buffer a layer's keys or states are in, and in which row of it."""
        return (position, row) if self.rows.stacked else (row, 0)

    def empty(self, batch: int, dtype: Any, local: bool) -> Buffers:
        """Zeros for the keys of all tokens and states, or (`local`) for the gradients of those that a chunk may see."""
        return [self.empty_buffer(index, batch, dtype, local) for index in range(len(self.stores))]

    def empty_buffer(self, index: int, batch: int, dtype: Any, local: bool) -> Held:
        """The same of one buffer."""
        rows, beside = self.rows.count if self.rows.stacked else 1, self.beside[index]
        states = None if beside is None else beside.empty(rows, batch, dtype, local)
        return Held(self.stores[index].empty(rows, batch, dtype, local), states)

    def forward(
        self, x: Chunk, keys: Buffers, remembered: Memories, i: Any, sequence: ChunkedSequence, write: bool
    ) -> tuple[Chunk, Buffers, Memories, Float[Array, "R P B C E"]]:
        """Chunk i through the layers: output, keys and memories with the chunk's own (if to `write` them), inputs."""
        rows, context, remembered = self.rows, sequence.context(i), dict(remembered)

        def row(row: Any, carry: tuple[Chunk, Buffers, Array]) -> tuple[Chunk, Buffers, Array]:
            x, keys, inputs = carry
            keys = list(keys)
            for position in range(rows.period):
                index, place = self.place(row, position)
                block, store = combine(*rows.layer(row, position)), self.stores[index]
                if not write:
                    inputs = jax.lax.dynamic_update_slice(inputs, x[None, None], (row, position, 0, 0, 0))
                held, states = keys[index]
                source = rows.source(row)
                if write and block.encoder is not None and source is not None:
                    # Models with memories are not stacked: this is Python's loop over layers.
                    remembered[source] = landmark_memory.write(remembered[source], landmark_memory.encode(block, x), i)
                memory = None if source is None else remembered[source]
                if isinstance(store, StateStore):
                    assert isinstance(held, RecurrentState)
                    x, new = store.forward(block, x, held, place, i, sequence, memory)
                    keys[index] = Held(new) if write else keys[index]
                    continue
                assert isinstance(held, KVBuffer)
                q, k, v = block.project(x, context)
                held = store.write(held, k, v, place, i) if write else held
                mixed, beside = None, self.beside[index]
                if beside is not None and states is not None:
                    mixed, new = beside.forward(block, x, states, place, i, sequence)
                    states = new if write else states
                keys[index] = Held(held, states)
                buffer, view = store.view(held, k, v, place, i, sequence)
                blocks = store.blocks(block)
                part = attend(block, blocks, q, buffer, view, context.segment_ids)
                heads = add_sink_logits(part, block.attention.learned_sinks()).out
                x = block.combine(x, heads, landmark_memory.view(memory, block, sequence, i), mixed)
            return x, keys, inputs

        shape = (0, 0) if write else (rows.count, rows.period)
        x, keys, inputs = rows.loop(0, rows.count, row, (x, keys, jnp.zeros((*shape, *x.shape), x.dtype)))
        return x, keys, remembered, inputs

    def backward(
        self,
        d_x: Chunk,
        inputs: Array,
        keys: Buffers,
        remembered: Memories,
        grads: list[Block],
        d_keys: Buffers,
        d_remembered: Memories,
        i: Any,
        sequence: ChunkedSequence,
        counts: Bool[Array, ""] | None = None,
    ) -> tuple[Chunk, list[Block], Buffers, Memories]:
        """Chunk i back through the layers: cotangent of its input, and the kinds of gradients with its part added.

        counts: whether the gradients of parameters get the chunk's part; None: they do.
        """
        rows, d_remembered = self.rows, dict(d_remembered)

        def summed(grads: list[Block], row: Any, position: int, new: Block) -> list[Block]:
            if counts is not None:
                new = jax.tree.map(lambda x: jnp.where(counts, x, 0), new)
            return rows.put(grads, row, position, add(rows.take(grads, row, position), new))

        def row(row: Any, carry: tuple[Chunk, list[Block], Buffers]) -> tuple[Chunk, list[Block], Buffers]:
            d_x, grads, d_keys = carry
            d_keys = list(d_keys)
            for position in reversed(range(rows.period)):
                index, place = self.place(row, position)
                params, rest = rows.layer(row, position)
                store = self.stores[index]
                x = jax.lax.dynamic_slice(inputs, (row, position, 0, 0, 0), (1, 1, *d_x.shape))[0, 0]
                (held, states), (d_held, d_states) = keys[index], d_keys[index]
                source = rows.source(row)
                memory, d_memory = (None if source is None else m[source] for m in (remembered, d_remembered))
                if isinstance(store, StateStore):
                    assert isinstance(held, RecurrentState)
                    assert isinstance(d_held, RecurrentState)
                    new, d_x, d_held, d_memory = store.backward(
                        params, rest, x, d_x, held, d_held, place, i, sequence, memory, d_memory
                    )
                    if source is not None and d_memory is not None:
                        d_remembered[source] = d_memory
                    d_keys[index] = Held(d_held)
                    grads = summed(grads, row, position, new)
                    continue
                assert isinstance(held, KVBuffer)
                assert isinstance(d_held, KVBuffer)
                see = partial(store.view, held, row=place, i=i, sequence=sequence)
                opened = store.open(d_held, place)
                blocks = store.blocks(combine(params, rest))
                mixed, back, beside = None, None, self.beside[index]
                if beside is not None and states is not None:
                    mixed, back = beside.output_and_vjp(params, rest, x, states, place, i, sequence)
                new, d_x, opened, d_memory, d_mixed = chunk_vjp(
                    params, rest, blocks, x, d_x, sequence, i, see, opened, memory, d_memory, mixed
                )
                if back is not None and d_mixed is not None and d_states is not None:
                    more, d_x_too, d_states, _ = back(d_mixed, d_states)
                    new, d_x = jax.tree.map(jnp.add, new, more), d_x + d_x_too
                if source is not None and d_memory is not None:
                    d_remembered[source] = d_memory
                d_keys[index] = Held(store.close(d_held, opened, place), d_states)
                grads = summed(grads, row, position, new)
            return d_x, grads, d_keys

        return *rows.loop_back(0, rows.count, row, (d_x, grads, d_keys)), d_remembered


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
    groups = [LayerGroup.make(rows, sequence) for rows in layer_stacks(model, options.trainable, split, reduction)]
    batch, steps = sequence.tokens.shape[1], jnp.arange(sequence.count)
    counted = sequence.counted(objective)

    def read(carry: tuple[list[Buffers], Memories], i: Any) -> tuple[tuple[list[Buffers], Memories], TokenStats | None]:
        keys, remembered = carry
        x, new = ends.embed(chunk_at(sequence.tokens, i)), []
        for group, mine in zip(groups, keys, strict=True):
            x, mine, remembered, _ = group.forward(x, mine, remembered, i, sequence, write=True)
            new.append(mine)
        if objective.separable:
            return (new, remembered), None
        targets, own = chunk_at(sequence.prepared["targets"], i), None if counted is None else chunk_at(counted, i)
        return (new, remembered), stats_of(ends, x, targets, own, options.logits_chunk)

    nothing = landmark_memory.empty_memories(model.config, sequence, model.dtype)
    empty = [group.empty(batch, model.dtype, False) for group in groups]
    (keys, remembered), stats = jax.lax.scan(read, (empty, nothing), steps)
    known, separable, sequence = objective_of_chunks(objective, sequence, stats)

    def chunk(carry: tuple[Any, ...], i: Any) -> tuple[tuple[Any, ...], None]:
        loss, d_output, d_embedding, d_layers, d_keys, d_remembered = carry
        x, inputs = ends.embed(chunk_at(sequence.tokens, i)), []
        for group, mine in zip(groups, keys, strict=True):
            x, _, _, held = group.forward(x, mine, remembered, i, sequence, write=False)
            inputs.append(held)
        prepared = {name: chunk_at(value, i) for name, value in sequence.prepared.items()}
        part, d_output, d_x = loss_and_vjp(ends, options, x, prepared, separable, d_output)
        d_layers, d_keys = list(d_layers), list(d_keys)
        for n in reversed(range(len(groups))):
            d_x, d_layers[n], d_keys[n], d_remembered = groups[n].backward(
                d_x, inputs[n], keys[n], remembered, d_layers[n], d_keys[n], d_remembered, i, sequence
            )
        d_embedding = embed_vjp(ends, options, chunk_at(sequence.tokens, i), d_x, d_embedding)
        return (loss + part, d_output, d_embedding, d_layers, d_keys, d_remembered), None

    start = (
        jnp.zeros((), accumulator(model.dtype)),
        output_zeros(ends, options),
        embed_zeros(ends, options),
        [group.rows.zero_sums(options.grad_dtype) for group in groups],
        [group.empty(batch, options.kv_grad_dtype, True) for group in groups],
        landmark_memory.empty_memories(model.config, sequence, options.kv_grad_dtype),
    )
    (loss, d_output, d_embedding, d_layers, *_), _ = jax.lax.scan(chunk, start, steps, reverse=True)
    d_ends = sum_of_ends(ends, options, d_output, d_embedding)
    pairs = [(group.rows, group.rows.finish(grads)) for group, grads in zip(groups, d_layers, strict=True)]
    return reduction.sum(loss if known is None else known), assemble(finish_ends(d_ends, split, reduction), pairs)
