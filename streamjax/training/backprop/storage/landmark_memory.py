"""Chunk memories of hierarchical sparse attention in chunked backprop: as keys and values are, one step further up.

A memory layer's input becomes pages, which later tokens of several layers read. Forwards, a chunk of the sequence
writes its own pages before it reads. Backwards, gradients of all pages are summed while layers and chunks are walked
from last to first; when a memory layer comes to a chunk, that of the chunk's own pages is complete and goes back
through the encoder. A chunk of the sequence holds whole pages.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from streamjax.attention.landmarks.page_attention import LandmarkPages
from streamjax.models.block import Block
from streamjax.models.config import ModelConfig
from streamjax.models.mixers.hierarchical import ReadablePages, page_segments, whole_view
from streamjax.training.backprop.sequence_chunks import ChunkedSequence
from streamjax.training.backprop.trainable_parameters import combine

Memories = dict[int, LandmarkPages]  # by the layer whose input they are made of


def whole_pages(config: ModelConfig, chunk_size: int) -> int:
    """`chunk_size`, rounded up to whole pages of the model's memory."""
    return chunk_size if config.hsa is None else -(-chunk_size // config.hsa.chunk_size) * config.hsa.chunk_size


def source_of(config: ModelConfig, layer: int) -> int | None:
    """The layer whose memory a layer reads, or makes; None where it does neither."""
    if config.hsa is None or not (config.reads(layer) or config.remembers(layer)):
        return None
    return max(source for source in config.hsa.memory_layers if source <= layer)


def empty_memories(config: ModelConfig, sequence: ChunkedSequence, dtype: Any) -> Memories:
    """Zeros for all pages of a sequence, or of a device's stretch of it, or for their gradients."""
    if config.hsa is None:
        return {}
    return {layer: empty_memory(config, layer, sequence, dtype) for layer in config.hsa.memory_layers}


def empty_memory(
    config: ModelConfig, layer: int, sequence: ChunkedSequence, dtype: Any, chunks: int | None = None
) -> LandmarkPages:
    """The same of one layer, or of so many chunks."""
    assert config.hsa is not None
    size, mixer = config.hsa.chunk_size, config.memory_block(layer).attention
    count = sequence.pages(size) if chunks is None else chunks * sequence.chunk_size // size
    shape, width = (sequence.batch_size, mixer.num_kv_heads, count), mixer.head_dim
    pages = jnp.zeros((*shape, size, width), dtype)
    return LandmarkPages(pages, pages, jnp.zeros((*shape, width), dtype))


def encode(block: Block, x: Float[Array, "B C E"]) -> LandmarkPages:
    """The pages of a chunk of the sequence."""
    assert block.encoder is not None
    return block.encoder.encode(rearrange(x, "b (p s) e -> b p s e", s=block.encoder.hsa.chunk_size))


def write(memory: LandmarkPages, made: LandmarkPages, i: Any) -> LandmarkPages:
    """`memory` with the pages of chunk i in it."""
    count = made.k.shape[2]
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), i * count, 2), memory, made
    )


def own_pages(memory: LandmarkPages, i: Any, like: LandmarkPages) -> LandmarkPages:
    """The pages of chunk i, in the dtypes of `like`."""
    count = like.k.shape[2]
    return jax.tree.map(lambda x, y: jax.lax.dynamic_slice_in_dim(x, i * count, count, 2).astype(y.dtype), memory, like)


def add_pages(memory: LandmarkPages, more: LandmarkPages, i: Any) -> LandmarkPages:
    """`memory` with these added to the pages of chunk i."""
    return write(memory, jax.tree.map(jnp.add, own_pages(memory, i, more), more), i)


def encode_back(
    params: Block, rest: Block, x: Float[Array, "B C E"], d_memory: LandmarkPages, i: Any
) -> tuple[Block, Float[Array, "B C E"]]:
    """Gradient of a layer's parameters, and the cotangent of its input, from the pages that chunk i of it became."""
    made, back = jax.vjp(lambda params, x: encode(combine(params, rest), x), params, x)
    return back(own_pages(d_memory, i, made))


def view(memory: LandmarkPages | None, block: Block, sequence: ChunkedSequence, i: Any) -> ReadablePages | None:
    """What the tokens of chunk i may read; None for a layer that does not read."""
    if block.reader is None or memory is None or block.hsa is None:
        return None
    of_chunks = None if sequence.segments is None else page_segments(sequence.segments, block.hsa.chunk_size)
    width = sequence.chunk_size
    return whole_view(memory, of_chunks, sequence.chunk_segments(i), block.hsa, i * width, width)
