"""The chunk order as a pipeline over the mesh axis `context`: stages have layers, and chunks go through them.

This is Mnemosyne's sequence pipeline parallelism (2409.17264) with a way back. Device d of P has the d-th part of the
stacked layers, and their keys, values and states for all tokens. A chunk leaves a stage for the next one as soon as it
is through, so chunk i is in the first stage while chunk i - 1 is in the second: what the chunk order computes one after
another on one device goes on at P places at once. Backwards the chunks come from the last to the first, through the
stages from the last to the first. N chunks take N + P - 1 ticks each way, of which a device idles P - 1.

In a tick that it idles a device computes all the same, as the devices run one program: before its first chunk it reads
zeros, whose results its first chunk writes over; behind its last chunk it computes that one again. Backwards such ticks
have a cotangent of zero, and what keys have gathered in a last one is left out of the sums.

The head and the embedding are no stage's: each device takes the chunks of its stretch of the sequence.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.attention.context.exchange import of_device, place, to_next, to_previous
from streamjax.models.block import Block
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import with_layers
from streamjax.training.backprop.chunk_order import LayerGroup
from streamjax.training.backprop.context.stretch import Stretch
from streamjax.training.backprop.embedding_and_head import (
    assemble,
    embed_backward,
    finish_ends,
    output_backward,
    whole_ends,
)
from streamjax.training.backprop.gradient_options import GradientOptions
from streamjax.training.backprop.gradient_reduction import Reduction
from streamjax.training.backprop.sequence_chunks import ChunkedSequence, chunk_at
from streamjax.training.backprop.storage.layer_stack import layer_stacks
from streamjax.training.objectives.objective import Objective

Chunk = Float[Array, "B C E"]
Chunks = Float[Array, "N B C E"]  # of all of the sequence,
OwnChunks = Float[Array, "M B C E"]  # and of a device's stretch of it


def ticks(chunks: int, stages: int) -> int:
    """How many chunk's times one way through the stages takes.

    Example:
      >>> ticks(32, 8)  # 7 of 39 are idle
      39
    """
    return chunks + stages - 1


def loss_and_grad(
    model: Decoder,
    sequence: ChunkedSequence,
    objective: Objective,
    options: GradientOptions,
    split: Decoder | None,
    reduction: Reduction,
) -> tuple[Float[Array, ""], Decoder]:
    """Loss and gradient; see `backprop.loss_and_grad` for the arguments, `over_rows` for the last two.

    `model` has this stage's layers, all stacked, and both ends; the sequence is whole.
    """
    ends = whole_ends(model, split, reduction)
    (rows,) = layer_stacks(_with_whole_layers(model, split, reduction), options.trainable, None, Reduction())
    group, mine = LayerGroup.make(rows, sequence), Stretch.of(sequence)
    keys, inputs, outputs = _forward(group, ends, sequence, mine)
    loss, d_output, d_outputs = output_backward(ends, options, outputs, mine, objective)
    d_layers, d_embeddings = _backward(group, sequence, options, keys, inputs, d_outputs)
    d_ends = embed_backward(ends, options, d_output, d_embeddings, mine)
    (own,) = layer_stacks(model, options.trainable, split, reduction)
    return reduction.sum(loss), assemble(finish_ends(d_ends, split, reduction), [(own, own.finish(d_layers))])


def _with_whole_layers(model: Decoder, split: Decoder | None, reduction: Reduction) -> Decoder:
    """The model with its layers whole along fsdp: a stage has few, and would gather them for every chunk."""
    return model if split is None else with_layers(model, reduction.gather(list(model.stack), list(split.stack)), [])


def _forward(
    group: LayerGroup, ends: Decoder, sequence: ChunkedSequence, mine: Stretch
) -> tuple[Any, Chunks, OwnChunks]:
    """This stage's keys and states, the inputs of its first layer, and the last layer's outputs for its stretch."""
    stage, stages = place()
    count, batch, dtype = sequence.count, sequence.tokens.shape[1], ends.dtype
    shape = jax.eval_shape(ends.embed, sequence.tokens[0])

    def tick(carry: tuple[Any, Chunk, Chunks, OwnChunks], t: Any) -> tuple[tuple[Any, Chunk, Chunks, OwnChunks], None]:
        keys, sent, inputs, outputs = carry
        i = jnp.clip(t - stage, 0, count - 1)
        x = jnp.where(stage == 0, ends.embed(chunk_at(sequence.tokens, i)), to_next(sent))
        inputs = jax.lax.dynamic_update_index_in_dim(inputs, x, i, 0)
        x, keys, _, _ = group.forward(x, keys, {}, i, sequence, write=True)
        outputs = _keep(outputs, of_device(stages - 1, x), t - (stages - 1))
        return (keys, x, inputs, outputs), None

    empty = jnp.zeros(shape.shape, shape.dtype)
    start = (
        group.empty(batch, dtype, False),
        empty,
        jnp.zeros((count, *shape.shape), shape.dtype),
        jnp.zeros((mine.count, *shape.shape), shape.dtype),
    )
    (keys, _, inputs, outputs), _ = jax.lax.scan(tick, start, jnp.arange(ticks(count, stages)))
    return keys, inputs, outputs


def _backward(
    group: LayerGroup,
    sequence: ChunkedSequence,
    options: GradientOptions,
    keys: Any,
    inputs: Chunks,
    d_outputs: OwnChunks,
) -> tuple[list[Block], OwnChunks]:
    """Sums of the gradients of this stage's layers, and the cotangents of the first layer's inputs for its stretch."""
    stage, stages = place()
    count, batch = sequence.count, sequence.tokens.shape[1]

    def tick(carry: tuple[Chunk, Any, Any, OwnChunks], t: Any) -> tuple[tuple[Chunk, Any, Any, OwnChunks], None]:
        sent, grads, d_keys, d_first = carry
        number = count - 1 - (t - (stages - 1 - stage))
        real, i = (number >= 0) & (number < count), jnp.clip(number, 0, count - 1)
        d_x = jnp.where(stage == stages - 1, _give(d_outputs, count - 1 - t), to_previous(sent))
        d_x = jnp.where(real, d_x, 0)
        *_, held = group.forward(chunk_at(inputs, i), keys, {}, i, sequence, write=False)
        d_x, grads, d_keys, _ = group.backward(d_x, held, keys, {}, grads, d_keys, {}, i, sequence, real)
        d_first = _keep(d_first, of_device(0, d_x), count - 1 - (t - (stages - 1)))
        return (d_x, grads, d_keys, d_first), None

    start = (
        jnp.zeros_like(d_outputs[0]),
        group.rows.zero_sums(options.grad_dtype),
        group.empty(batch, options.kv_grad_dtype, True),
        jnp.zeros_like(d_outputs),
    )
    (_, grads, _, d_first), _ = jax.lax.scan(tick, start, jnp.arange(ticks(count, stages)))
    return grads, d_first


def _keep(mine: OwnChunks, x: Chunk, i: Any) -> OwnChunks:
    """The chunks of this device's stretch with chunk i of the sequence among them, if it is one of them."""
    number = i - place()[0] * mine.shape[0]
    at = jnp.clip(number, 0, mine.shape[0] - 1)
    new = jnp.where(number == at, x, chunk_at(mine, at))
    return jax.lax.dynamic_update_index_in_dim(mine, new, at, 0)


def _give(mine: OwnChunks, i: Any) -> Chunk:
    """Chunk i of the sequence, from the device that has it; zeros where there is none."""
    return of_device(i // mine.shape[0], chunk_at(mine, i % mine.shape[0]))
