"""Attention of one chunk to the keys that it sees, forwards and backwards: by the platform's kernels, or by XLA loops.

The kernels take buffers that hold the keys of a sequence in order from its first token: all of them in the layer order,
those of layers with full attention in the chunk order. What a window moves along, and platforms without kernels, are
the loops of `streamjax.attention.blockwise`. Which it is, is logged once.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from pallas_kernels import api
from pallas_kernels.api import platforms
from pallas_kernels.padding import padded
from pallas_kernels.partial import Partial
from streamjax.attention import blockwise
from streamjax.attention.blockwise import Blocks, Keys, Queries, block_sizes, even_block
from streamjax.attention.dispatch import KERNEL_TOKENS, logged
from streamjax.attention.sharded import Names, names_of_partial, per_device_call, whole_on_each_device
from streamjax.models.block import Block
from streamjax.training.backprop.sequence_chunks import KVBuffer, KVView

_QUERY: Names = ("batch", None, "heads", None)
_BUFFER: Names = (None, "batch", "kv_heads", None, None)
_READS: tuple[Names, ...] = (_QUERY, _BUFFER, _BUFFER, ("batch", None), ("batch", None), ("heads",), (), ())
_PART = names_of_partial(_QUERY)


def attention_blocks(block: Block, chunk_size: int, block_k: int, leading: int = 0) -> Blocks:
    """What is static in a chunk's attention."""
    config = block.attention.config
    block_q = even_block(chunk_size, block_sizes()[0])
    return Blocks(config.pattern, config.softmax_scale, config.softcap, block_q, block_k, leading)


def attend(
    block: Block, blocks: Blocks, q: Float[Array, "B C H D"], buffer: KVBuffer, view: KVView, segments: Array | None
) -> Partial:
    """Attention of a chunk's queries to tokens; its own keys are in the buffer. `add_sink_logits` completes it."""
    if _kernels_take(block, blocks, q, buffer, view):

        def call(q: Array, k: Array, v: Array, ids: Any, key_ids: Any, slopes: Any, offset: Any, row: Any) -> Partial:
            known = _known(blocks, ids, key_ids, slopes, offset, row)
            return api.chunk_attention(q, k, v, blocks.pattern, **known)

        return per_device_call(call, _READS, _PART, _read(block, q, buffer, view, segments))
    out, lse = blockwise.forward(blocks, _queries(block, blocks, q, segments, view.offset), _keys(buffer, view))
    return Partial(_join(out, q.shape[1]), _join(lse[..., None], q.shape[1])[..., 0])


def gradients(
    block: Block,
    blocks: Blocks,
    q: Float[Array, "B C H D"],
    buffer: KVBuffer,
    view: KVView,
    segments: Array | None,
    part: Partial,
    d_out: Float[Array, "B C H D"],
    grads: KVBuffer,
) -> tuple[Float[Array, "B C H D"], KVBuffer]:
    """Gradient of a chunk's queries, and `grads` with what it adds to the gradients of the keys that it sees.

    Args:
      block, blocks, q, buffer, view, segments: as for `attend`.
      part: what it gave, with the layer's sinks: a softmax over tokens and sinks has the log-sum-exp of both.
      d_out: cotangent of its output.
      grads: a buffer for gradients, in the shape of `buffer`.
    """
    if _kernels_take(block, blocks, q, buffer, view):

        def call(
            q: Array, k: Array, v: Array, ids: Any, key_ids: Any, slopes: Any, offset: Any, row: Any,
            out: Array, lse: Array, d_out: Array, d_k: Array, d_v: Array,
        ) -> Any:  # fmt: skip
            known = _known(blocks, ids, key_ids, slopes, offset, row)
            return api.chunk_gradients(q, k, v, blocks.pattern, Partial(out, lse), d_out, d_k, d_v, **known)

        names = (*_READS, *_PART, _QUERY, _BUFFER, _BUFFER)
        arrays = (*_read(block, q, buffer, view, segments), *part, d_out, *grads)
        d_q, *d_keys = per_device_call(call, names, (_QUERY, _BUFFER, _BUFFER), arrays)
        return d_q, KVBuffer(*d_keys)
    queries = _queries(block, blocks, q, segments, view.offset)
    whole = [
        _grouped(x, block.attention.config.num_kv_heads, blocks.block_q) for x in (d_out, part.out, part.lse[..., None])
    ]
    shift, lse = -jnp.sum(whole[0] * whole[1], axis=-1), whole[2][..., 0]
    d_q, *d_keys = blockwise.backward(blocks, queries, _keys(buffer, view), lse, whole[0], shift, *grads)
    return _join(d_q, q.shape[1]), KVBuffer(*d_keys)


def _kernels_take(block: Block, blocks: Blocks, q: Array, buffer: KVBuffer, view: KVView) -> bool:
    """Whether the platform's kernels do it: see the module; and each device must have key heads of its own."""
    in_order = isinstance(view.base, int) and view.base == 0 and blocks.leading == 0
    takes = (
        in_order
        and q.shape[1] >= KERNEL_TOKENS
        and q.dtype == buffer.k.dtype
        and platforms.takes_buffer(blocks.pattern, buffer.k.shape[3], buffer.k.shape[4], q.dtype.name)
        and not whole_on_each_device("kv_heads", block.attention.config.num_kv_heads)
    )
    if takes:
        logged("pallas")
    return takes


def _read(block: Block, q: Array, buffer: KVBuffer, view: KVView, segments: Array | None) -> tuple[Array | None, ...]:
    """What the kernels read, as `_READS` names it."""
    key_segments = None if segments is None else view.segments
    place = (jnp.asarray(x, jnp.int32) for x in (view.offset, view.row))
    return (q, *buffer, segments, key_segments, block.attention.slopes(), *place)


def _known(blocks: Blocks, ids: Any, key_ids: Any, slopes: Any, offset: Any, row: Any) -> dict[str, Any]:
    segments = None if ids is None else (ids, key_ids)
    return {"scale": blocks.scale, "softcap": blocks.softcap, "slopes": slopes, "segment_ids": segments,
            "offset": offset, "row": row}  # fmt: skip


def _queries(block: Block, blocks: Blocks, q: Float[Array, "B C H D"], segments: Array | None, offset: Any) -> Queries:
    slopes, heads = block.attention.slopes(), block.attention.config.num_kv_heads
    return Queries(
        q=_grouped(q, heads, blocks.block_q),
        segments=None if segments is None else padded(segments, 1, blocks.block_q),
        slopes=None if slopes is None else rearrange(slopes, "(k g) -> k g", k=heads),
        offset=offset,
    )


def _keys(buffer: KVBuffer, view: KVView) -> Keys:
    """The keys that a chunk may see, for `blockwise`."""
    return Keys(buffer.k, buffer.v, view.segments, view.row, view.base, view.stop)


def _grouped(x: Float[Array, "B C H D"], key_heads: int, size: int) -> Float[Array, "B K G P D"]:
    """Whole blocks of `size` queries, in their groups."""
    return padded(rearrange(x, "b c (k g) d -> b k g c d", k=key_heads), 3, size)


def _join(x: Float[Array, "B K G P D"], length: int) -> Float[Array, "B C H D"]:
    """The first `length` of P padded queries, heads together."""
    return rearrange(x[:, :, :, :length], "b k g c d -> b c (k g) d")
