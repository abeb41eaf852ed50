"""One chunk of one layer, backwards: the step that both orders of chunked backprop repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.partial import add_sinks
from streamjax.attention.blockwise import Blocks
from streamjax.attention.landmark_attention import LandmarkPages
from streamjax.models.block import Block
from streamjax.training.backprop import chunk_attention
from streamjax.training.backprop.sequence_chunks import ChunkedSequence, KVBuffer, KVView, add
from streamjax.training.backprop.storage import landmark_memory
from streamjax.training.backprop.trainable_parameters import combine


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

    Returns:
      The gradient of `params` from this chunk, the cotangent of `x`, `grads` and `d_memory` with what this chunk adds,
      and the cotangent of `beside`; what comes through that is in neither of the first two.
    """
    length, context = x.shape[1], sequence.context(i)
    (q, k, v), project_vjp = jax.vjp(lambda p, x: combine(p, rest).project(x, context), params, x)
    buffer, view = visible_kv(k, v)
    seen = combine(params, rest), blocks, q, buffer, view, context.segment_ids
    tokens = chunk_attention.attend(*seen)
    part = add_sinks(tokens, seen[0].attention.sinks())

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
        _, sinks_vjp = jax.vjp(lambda p: add_sinks(tokens, combine(p, rest).mixer.sinks()).out, params)
        d_params = jax.tree.map(jnp.add, d_params, sinks_vjp(d_heads)[0])
    d_q, grads = chunk_attention.gradients(*seen, part, d_heads, grads)
    d_k, d_v = grads.own(view, length, blocks.leading).tokens(k.dtype)
    more, d_x_too = project_vjp((d_q.astype(q.dtype), d_k, d_v))
    return jax.tree.map(jnp.add, d_params, more), d_x + d_x_too, grads, d_memory, d_beside
