"""One layer over the chunks of a sequence, forwards and backwards, for the layer order; and one chunk of it backwards,
which both orders of chunked backprop repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.partial import Partial, accumulator, add_sink_logits
from streamjax.attention.blockwise import Blocks
from streamjax.attention.landmarks.page_attention import LandmarkPages
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.block import Block
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.parallel.rules import constrain
from streamjax.training.backprop.chunk_attention import attend, attention_blocks, gradients
from streamjax.training.backprop.context.stretch import Stretch
from streamjax.training.backprop.context.stretch_passes import stretch_backward, stretch_forward
from streamjax.training.backprop.gradient_options import GradientOptions
from streamjax.training.backprop.sequence_chunks import (
    ChunkedSequence,
    KVBuffer,
    KVView,
    add,
    chunk_at,
    whole_view,
    zeros_like,
)
from streamjax.training.backprop.storage import landmark_memory
from streamjax.training.backprop.storage.activation_store import ActivationReader
from streamjax.training.backprop.storage.state_store import StateStore
from streamjax.training.backprop.trainable_parameters import combine

Chunks = Float[Array, "N B C E"]


def chunk_vjp(
    params: Block,
    rest: Block,
    blocks: Blocks,
    x: Float[Array, "B C E"],
    d_y: Float[Array, "B C E"],
    sequence: ChunkedSequence,
    i: Any,
    visible_kv: Callable[[Array, Array], tuple[KVBuffer, KVView]],
    grads: KVBuffer,
    memory: LandmarkPages | None = None,
    d_memory: LandmarkPages | None = None,
    beside: Float[Array, "B C V"] | None = None,
    found: Partial | None = None,
) -> tuple[Block, Float[Array, "B C E"], KVBuffer, LandmarkPages | None, Float[Array, "B C V"] | None]:
    """Pull a chunk's cotangent back through a layer.

    Args:
      params, rest: the layer's parameters that are trained, and the others (`trainable.partition`).
      blocks: from `attention_blocks`.
      x, d_y: the chunk's input, and the cotangent of its output.
      sequence, i: which chunk it is, of which sequence.
      visible_kv: from the chunk's own keys and values, those of all tokens that it sees.
      grads: gradients of these, complete but for this chunk and those before it.
      memory, d_memory: the chunk memory that the layer reads or makes, and its gradients, complete but for this layer's
        from this chunk and those before it, and for the layers below.
      beside: what a recurrent mixer beside attention makes of the chunk, where the layer has one.
      found: what attention to tokens gave in the forward pass; computed again where None.

    Returns:
      The gradient of `params` from this chunk, the cotangent of `x`, `grads` and `d_memory` with what this chunk adds,
      and the cotangent of `beside`; what comes through that is in neither of the first two.
    """
    length, context = x.shape[1], sequence.context(i)
    (q, k, v), project_vjp = jax.vjp(lambda p, x: combine(p, rest).project(x, context), params, x)
    buffer, view = visible_kv(k, v)
    seen = combine(params, rest), blocks, q, buffer, view, context.segment_ids
    tokens = attend(*seen) if found is None else found
    part = add_sink_logits(tokens, seen[0].attention.learned_sinks())

    def after_attention(
        params: Block, x: Array, heads: Array, memory: LandmarkPages | None, beside: Array | None
    ) -> Array:
        block = combine(params, rest)
        return block.combine(x, heads, landmark_memory.view(memory, block, sequence, i), beside)

    block = seen[0]
    memory = None if block.reader is None else memory
    _, combine_vjp = jax.vjp(after_attention, params, x, part.out, memory, beside)
    d_params, d_x, d_heads, d_pages, d_beside = combine_vjp(d_y)
    if d_pages is not None and d_memory is not None:
        d_memory = add(d_memory, d_pages)
    if block.encoder is not None and d_memory is not None:
        from_pages, d_x_pages = landmark_memory.encode_back(params, rest, x, d_memory, i)
        d_params, d_x = jax.tree.map(jnp.add, d_params, from_pages), d_x + d_x_pages
    if params.attention.sink_logits is not None:
        _, sinks_vjp = jax.vjp(lambda p: add_sink_logits(tokens, combine(p, rest).mixer.learned_sinks()).out, params)
        d_params = jax.tree.map(jnp.add, d_params, sinks_vjp(d_heads)[0])
    d_q, grads = gradients(*seen, part, d_heads, grads)
    d_k, d_v = grads.own(view, length, blocks.leading).tokens(k.dtype)
    more, d_x_too = project_vjp((d_q.astype(q.dtype), d_k, d_v))
    return jax.tree.map(jnp.add, d_params, more), d_x + d_x_too, grads, d_memory, d_beside


def layer_forward(
    block: Block,
    x: Chunks,
    sequence: ChunkedSequence,
    memory: LandmarkPages | None = None,
    known: bool = False,
    keep: bool = False,
) -> tuple[Chunks, LandmarkPages | None, Partial | None]:
    """A layer over all chunks; each output takes its input's place.

    `memory`: the pages that the layer reads. A layer that makes them fills them in, unless they are `known`. Third is
    what attention to tokens found, [N, B, C, ...], for a layer that attends and if it is to `keep` it.
    """
    if isinstance(sequence, Stretch):
        return stretch_forward(block, x, sequence, memory, known, keep)
    if isinstance(block.mixer, RecurrentMixer):
        return *recurrent_forward(block, x, sequence, memory, known), None
    blocks = attention_blocks(block, sequence.chunk_size, sequence.block_k)

    def chunk(
        i: Any, carry: tuple[Chunks, KVBuffer, LandmarkPages | None, RecurrentState | None, Partial | None]
    ) -> tuple[Chunks, KVBuffer, LandmarkPages | None, RecurrentState | None, Partial | None]:
        x, buffer, memory, state, found = carry
        own, context, view = chunk_at(x, i), sequence.context(i), whole_view(sequence, i)
        q, k, v = block.project(own, context)
        buffer = buffer.write(k, v, 0, view.own)
        if block.encoder is not None and memory is not None and not known:
            memory = landmark_memory.write(memory, landmark_memory.encode(block, own), i)
        read = landmark_memory.view(memory, block, sequence, i)
        tokens = attend(block, blocks, q, buffer, view, context.segment_ids)
        part = add_sink_logits(tokens, block.attention.learned_sinks())
        if found is not None:
            found = jax.tree.map(lambda kept, new: jax.lax.dynamic_update_index_in_dim(kept, new, i, 0), found, tokens)
        mixed = None
        if state is not None:
            mixed, state = block.recur_beside(own, state, context)
        y = block.combine(own, part.out, read, mixed)
        return jax.lax.dynamic_update_index_in_dim(x, y, i, 0), buffer, memory, state, found

    buffer = KVBuffer.zeros(block.mixer.config, 1, x.shape[1], sequence.slots, x.dtype)
    state = None if block.beside is None else block.beside.empty(x.shape[1], x.dtype)
    found = empty_partials(block, x, buffer.v.shape[-1]) if keep else None
    x, _, memory, _, found = jax.lax.fori_loop(0, sequence.count, chunk, (x, buffer, memory, state, found))
    return x, memory, found


def empty_partials(block: Block, x: Chunks, width: int) -> Partial:
    """A place for what attention finds for all chunks; values are `width` channels."""
    shape, axes = (*x.shape[:-1], block.attention.config.num_heads), (None, "batch", None, "heads")
    out, lse = (jnp.zeros(shape, accumulator(x.dtype)) for shape in ((*shape, width), shape))
    return Partial(constrain(out, *axes, None), constrain(lse, *axes))


def layer_backward(
    params: Block,
    rest: Block,
    inputs: ActivationReader,
    d_y: Chunks,
    sequence: ChunkedSequence,
    options: GradientOptions,
    memory: LandmarkPages | None = None,
    d_memory: LandmarkPages | None = None,
    found: ActivationReader | None = None,
) -> tuple[Block, Chunks, LandmarkPages | None]:
    """Gradient of a layer's trained parameters, and the cotangent of its input in the place of that of its output.

    `inputs` gives the chunks of the layer's input; `memory` are the pages that it reads or makes, and `d_memory` their
    gradients from the layers above, to which the layer's are added. `found`: what attention found of each chunk, if
    that was kept.
    """
    if isinstance(sequence, Stretch):
        return stretch_backward(params, rest, inputs, d_y, sequence, options, memory, d_memory, found)
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
        i: Any, kept: Any, carry: tuple[Any, Chunks, KVBuffer, LandmarkPages | None, Any]
    ) -> tuple[Any, Chunks, KVBuffer, LandmarkPages | None, Any]:
        total, d_y, grads, d_memory, d_states = carry
        x, tokens = (kept, None) if found is None else kept
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
            tokens,
        )
        if back is not None and d_mixed is not None:
            more, d_x_too, d_states, _ = back(d_mixed, d_states)
            part, d_x = jax.tree.map(jnp.add, part, more), d_x + d_x_too
        return add(total, part), jax.lax.dynamic_update_index_in_dim(d_y, d_x, i, 0), grads, d_memory, d_states

    grads = KVBuffer.zeros(block.mixer.config, 1, batch, sequence.slots, options.kv_grad_dtype)
    sums = zeros_like(params, options.grad_dtype)
    both = inputs if found is None else inputs.beside(found)
    total, d_x, _, d_memory, _ = both.each_back(chunk, (sums, d_y, grads, d_memory, none[1]))
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
