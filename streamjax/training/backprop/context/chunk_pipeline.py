"""The chunk order as a pipeline over the mesh axis `context`: stages have layers, and chunks go through them.

This is Mnemosyne's sequence pipeline parallelism (2409.17264) with a way back. Device d of P has the d-th part of the
layers (`stages.py`), and their keys, values and states for all tokens. A chunk leaves a stage for the next one as soon
as it is through, so chunk i is in the first stage while chunk i - 1 is in the second: what the chunk order computes one
after another on one device goes on at P places at once. Backwards the chunks come from the last to the first, through
the stages from the last to the first. N chunks take N + P - 1 ticks each way, of which a device idles P - 1.

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
from streamjax.training.backprop.context.stages import Stages, StageState, stages_of
from streamjax.training.backprop.context.stretch import Stretch
from streamjax.training.backprop.embedding_and_head import embed_backward, finish_ends, output_backward, whole_ends
from streamjax.training.backprop.gradient_options import GradientOptions
from streamjax.training.backprop.gradient_reduction import Reduction
from streamjax.training.backprop.sequence_chunks import ChunkedSequence, chunk_at
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

    `model` has this stage's layers, all stacked, or all stages' layers, and both ends; the sequence is whole.
    """
    ends, mine = whole_ends(model, split, reduction), Stretch.of(sequence)
    stages = stages_of(model, sequence, options, split, reduction)
    kept, inputs, outputs = _forward(stages, ends, sequence, mine)
    loss, d_output, d_outputs = output_backward(ends, options, outputs, mine, objective)
    sums, d_embeddings = _backward(stages, options, kept, inputs, d_outputs)
    d_ends = embed_backward(ends, options, d_output, d_embeddings, mine)
    return reduction.sum(loss), with_layers(finish_ends(d_ends, split, reduction), *stages.finish(sums))


def _forward(
    stages: Stages, ends: Decoder, sequence: ChunkedSequence, mine: Stretch
) -> tuple[StageState, Chunks, OwnChunks]:
    """What this stage keeps, the inputs of its first layer, and the last layer's outputs for its stretch."""
    stage, size = place()
    count = sequence.count
    shape = jax.eval_shape(ends.embed, sequence.tokens[0])

    def tick(carry: Any, t: Any) -> tuple[Any, None]:
        kept, (sent, handed), inputs, outputs = carry
        i = jnp.clip(t - stage, 0, count - 1)
        x = jnp.where(stage == 0, ends.embed(chunk_at(sequence.tokens, i)), to_next(sent))
        inputs = jax.lax.dynamic_update_index_in_dim(inputs, x, i, 0)
        x, handed, kept = stages.forward(x, jax.tree.map(to_next, handed), kept, i)
        outputs = _keep(outputs, of_device(size - 1, x), t - (size - 1))
        return (kept, (x, handed), inputs, outputs), None

    start = (
        stages.empty(ends.dtype, False),
        (jnp.zeros(shape.shape, shape.dtype), stages.nothing_handed(ends.dtype)),
        jnp.zeros((count, *shape.shape), shape.dtype),
        jnp.zeros((mine.count, *shape.shape), shape.dtype),
    )
    (kept, _, inputs, outputs), _ = jax.lax.scan(tick, start, jnp.arange(ticks(count, size)))
    return kept, inputs, outputs


def _backward(
    stages: Stages, options: GradientOptions, kept: StageState, inputs: Chunks, d_outputs: OwnChunks
) -> tuple[list[Block], OwnChunks]:
    """Sums of the gradients of this stage's layers, and the cotangents of the first layer's inputs for its stretch."""
    (stage, size), count = place(), inputs.shape[0]

    def tick(carry: Any, t: Any) -> tuple[Any, None]:
        (sent, d_handed), sums, d_kept, d_first = carry
        number = count - 1 - (t - (size - 1 - stage))
        real, i = (number >= 0) & (number < count), jnp.clip(number, 0, count - 1)
        d_x = jnp.where(stage == size - 1, _give(d_outputs, count - 1 - t), to_previous(sent))
        d_x, d_handed = (
            jax.tree.map(lambda x: jnp.where(real, x, 0), each) for each in (d_x, jax.tree.map(to_previous, d_handed))
        )
        d_x, d_handed, sums, d_kept = stages.backward(chunk_at(inputs, i), d_x, d_handed, kept, sums, d_kept, i, real)
        d_first = _keep(d_first, of_device(0, d_x), count - 1 - (t - (size - 1)))
        return ((d_x, d_handed), sums, d_kept, d_first), None

    start = (
        (jnp.zeros_like(d_outputs[0]), stages.nothing_handed(options.kv_grad_dtype)),
        stages.sums,
        stages.empty(options.kv_grad_dtype, True),
        jnp.zeros_like(d_outputs),
    )
    (_, sums, _, d_first), _ = jax.lax.scan(tick, start, jnp.arange(ticks(count, size)))
    return sums, d_first


def _keep(mine: OwnChunks, x: Chunk, i: Any) -> OwnChunks:
    """The chunks of this device's stretch with chunk i of the sequence among them, if it is one of them."""
    number = i - place()[0] * mine.shape[0]
    at = jnp.clip(number, 0, mine.shape[0] - 1)
    new = jnp.where(number == at, x, chunk_at(mine, at))
    return jax.lax.dynamic_update_index_in_dim(mine, new, at, 0)


def _give(mine: OwnChunks, i: Any) -> Chunk:
    """Chunk i of the sequence, from the device that has it; zeros where there is none."""
    return of_device(i // mine.shape[0], chunk_at(mine, i % mine.shape[0]))
