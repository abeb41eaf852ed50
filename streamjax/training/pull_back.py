"""One chunk of one layer, backwards: the step that both orders of chunked backprop repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from streamjax.attention import blockwise
from streamjax.attention.blockwise import Blocks
from streamjax.attention.hierarchical import Chunks as Pages
from streamjax.models.config import LayerSpec
from streamjax.models.decoder import Block
from streamjax.training import memories
from streamjax.training.chunks import Buffer, Sequence, View, add, join_heads, keys_of, queries_of, whole_blocks
from streamjax.training.trainable import combine


def pull_back(
    params: Block,
    rest: Block,
    spec: LayerSpec,
    blocks: Blocks,
    x: Float[Array, "B C E"],
    d_y: Float[Array, "B C E"],
    sequence: Sequence,
    i: Any,
    see: Callable[[Array, Array], tuple[Buffer, View]],
    grads: Buffer,
    memory: Pages | None = None,
    d_memory: Pages | None = None,
) -> tuple[Block, Float[Array, "B C E"], Buffer, Pages | None]:
    """Pull a chunk's cotangent back through a layer.

    Args:
      params, rest: the layer's parameters that are trained, and the others (`trainable.partition`).
      spec: what distinguishes the layer.
      blocks: from `attention_blocks`.
      x, d_y: the chunk's input, and the cotangent of its output.
      sequence, i: which chunk it is, of which sequence.
      see: from the chunk's own keys and values, those of all tokens that it sees.
      grads: gradients of these, complete but for this chunk and those before it.
      memory, d_memory: the chunk memory that the layer reads or makes, and its gradients, complete but for this layer's
        from this chunk and those before it, and for the layers below.

    Returns:
      The gradient of `params` from this chunk, the cotangent of `x`, and `grads` and `d_memory` with what this chunk
      adds.
    """
    length, context = x.shape[1], sequence.context(i)
    (q, k, v), project_vjp = jax.vjp(lambda p, x: combine(p, rest).project(x, context), params, x)
    buffer, view = see(k, v)
    queries = queries_of(combine(params, rest), blocks, q, context.segment_ids, view.offset)
    keys = keys_of(buffer, view)
    out, lse = blockwise.forward(blocks, queries, keys)

    def behind(params: Block, x: Array, heads: Array, memory: Pages | None) -> Array:
        block = combine(params, rest)
        return block.combine(x, heads, memories.view(memory, spec, block.config, sequence, i))

    _, combine_vjp = jax.vjp(behind, params, x, join_heads(out, length), memory if spec.reads else None)
    d_params, d_x, d_heads, d_pages = combine_vjp(d_y)
    if d_pages is not None and d_memory is not None:
        d_memory = add(d_memory, d_pages)
    if spec.remembers and d_memory is not None:
        made, encode_vjp = jax.vjp(lambda p, x: memories.encode(combine(p, rest), x), params, x)
        from_pages, d_x_pages = encode_vjp(memories.own_pages(d_memory, i, made))
        d_params, d_x = jax.tree.map(jnp.add, d_params, from_pages), d_x + d_x_pages
    d_out = rearrange(d_heads, "b c (k g) d -> b k g c d", k=out.shape[1])
    d_out = whole_blocks(d_out, 3, blocks.block_q)
    shift = -jnp.sum(d_out * out, axis=-1)
    d_q, *d_keys = blockwise.backward(blocks, queries, keys, lse, d_out, shift, grads.k, grads.v)
    grads = Buffer(*d_keys)
    d_k, d_v = grads.own(view, length, blocks.leading).tokens(k.dtype)
    more, d_x_too = project_vjp((join_heads(d_q, length).astype(q.dtype), d_k, d_v))
    return jax.tree.map(jnp.add, d_params, more), d_x + d_x_too, grads, d_memory
