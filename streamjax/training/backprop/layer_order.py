"""Chunked backprop with the layers outside and the chunks inside: StreamBP (2506.03077).

Of the forward pass only layers' inputs are kept, of every layer or of every `segment`-th. The backward pass walks the
layers from the last to the first. In a layer it computes the keys and values of all tokens once and walks the chunks
from the last to the first; of a chunk all else is computed again, used and forgotten. So what a layer computes inside,
the logits too, exist for one chunk at a time, and what grows with the sequence is the kept inputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.partial import Partial
from streamjax.models.block import Block
from streamjax.models.decoder import Decoder
from streamjax.training.backprop.embedding_and_head import (
    assemble,
    embed_backward,
    finish_ends,
    output_backward,
    whole_ends,
)
from streamjax.training.backprop.gradient_options import GradientOptions
from streamjax.training.backprop.gradient_reduction import Reduction
from streamjax.training.backprop.layer_passes import Chunks, layer_backward, layer_forward
from streamjax.training.backprop.sequence_chunks import ChunkedSequence, chunk_at
from streamjax.training.backprop.storage import landmark_memory
from streamjax.training.backprop.storage.activation_store import ActivationStore, StoredActivations
from streamjax.training.backprop.storage.kept_attention import KeptAttention
from streamjax.training.backprop.storage.landmark_memory import Memories
from streamjax.training.backprop.storage.layer_stack import LayerStack, layer_stacks
from streamjax.training.backprop.trainable_parameters import combine
from streamjax.training.objectives.objective import Objective


def rows_forward(
    rows: LayerStack,
    inputs: ActivationStore,
    x: Chunks,
    sequence: ChunkedSequence,
    remembered: Memories,
    attention: KeptAttention | None = None,
) -> tuple[Chunks, StoredActivations, Any]:
    """Output of some rows of layers, what `inputs` keeps of the way, and what `attention` does. Memories are filled in.

    `attention` keeps what it does of every layer: then `inputs` has to keep every layer's input.
    """

    def segment(s: Any, carry: tuple[Chunks, list[Array]]) -> tuple[tuple[Chunks, list[Array]], tuple[list, list]]:
        x, here = carry
        here, away, found = inputs.keep(here, s, 0, x), [inputs.send(x)], []

        def row(row: Any, carry: tuple[Chunks, list[Array]]) -> tuple[Chunks, list[Array]]:
            x, here = carry
            for position in range(rows.period):
                if position and inputs.every:  # then a segment is this row alone
                    here = inputs.keep(here, row, position, x)
                    away.append(inputs.send(x))
                x, parts = place_forward(rows, sequence, remembered, False, row, position, x, attention is not None)
                if attention is not None:
                    found.append(attention.keep(parts))
            return x, here

        return inputs.walk(s, row, (x, here)), (away, found)

    (x, here), kept = rows.scan(inputs.segments, segment, (x, inputs.empty(x)))
    away, found = kept if rows.stacked else zip(*kept, strict=True)
    return x, StoredActivations(here, away), found


def rows_backward(
    rows: LayerStack,
    inputs: ActivationStore,
    kept: StoredActivations,
    d_x: Chunks,
    sequence: ChunkedSequence,
    options: GradientOptions,
    remembered: Memories,
    attention: KeptAttention | None = None,
    found: Any = None,
) -> tuple[list[Block], Chunks]:
    """Gradients of some rows of layers, and the cotangent of the first one's input."""
    d_remembered = landmark_memory.empty_memories(rows.config, sequence, options.kv_grad_dtype)

    def segment(s: Any, carry: tuple[list[Block], Chunks]) -> tuple[list[Block], Chunks]:
        again = lambda row, position, x: place_forward(rows, sequence, remembered, True, row, position, x)[0]  # noqa: E731
        inner = inputs.recompute(kept, s, again)

        def row(row: Any, carry: tuple[list[Block], Chunks]) -> tuple[list[Block], Chunks]:
            grads, d_x = carry
            for position in reversed(range(rows.period)):
                chunks = inputs.reader(kept, inner, s, row, position)
                params, rest = rows.layer(row, position)
                source = rows.source(row)
                memory, d_memory = (None if source is None else m[source] for m in (remembered, d_remembered))
                parts = None if attention is None else attention.reader(found, row, position)
                new, d_x, d_memory = layer_backward(
                    params, rest, chunks, d_x, sequence, options, memory, d_memory, parts
                )
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
    keep: bool = False,
) -> tuple[Chunks, Partial | None]:
    """The layer at a place of the rows over all chunks, and what its attention found, if it is to `keep` that. It
    reads its memory in `remembered`, and fills in what it makes unless that is `known`."""
    source = rows.source(row)
    memory = None if source is None else remembered[source]
    x, memory, found = layer_forward(combine(*rows.layer(row, position)), x, sequence, memory, known, keep)
    if source is not None and memory is not None:
        remembered[source] = memory  # models with memories are not stacked: this is Python's loop over layers
    return x, found


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
        attention = KeptAttention(rows.stacked, sequence.count, away) if options.keep_attention else None
        x, kept, found = rows_forward(rows, inputs, x, sequence, remembered, attention)
        held.append((rows, inputs, kept, attention, found))
    loss, d_output, d_x = output_backward(ends, options, x, sequence, objective)
    d_layers = []
    for rows, inputs, kept, attention, found in reversed(held):
        grads, d_x = rows_backward(rows, inputs, kept, d_x, sequence, options, remembered, attention, found)
        d_layers.append((rows, grads))
    d_ends = embed_backward(ends, options, d_output, d_x, sequence)
    return reduction.sum(loss), assemble(finish_ends(d_ends, split, reduction), d_layers)
