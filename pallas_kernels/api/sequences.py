"""Attention of sequences, and of chunks of them: see `pallas_kernels.api`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels import argument_checks
from pallas_kernels.api.platforms import Implementation, find
from pallas_kernels.gpu import chunk_attention as gpu_chunk
from pallas_kernels.gpu import flash_attention as gpu_flash
from pallas_kernels.gpu import hsa_attention as gpu_hsa
from pallas_kernels.gpu.hopper import attention as hopper_attention
from pallas_kernels.partial import Partial, add_sink_logits
from pallas_kernels.patterns import Pattern
from pallas_kernels.tpu import chunk_attention as tpu_chunk
from pallas_kernels.tpu import flash_attention as tpu_flash
from pallas_kernels.tpu import hsa_attention as tpu_hsa

_FLASH = {
    "tpu": tpu_flash.flash_attention,
    "triton": gpu_flash.flash_attention,
    "mosaic_gpu": hopper_attention.flash_attention,
}
_CHUNK = {"tpu": tpu_chunk.chunk_attention, "triton": gpu_chunk.chunk_attention}
_CHUNK_GRADIENTS = {"tpu": tpu_chunk.chunk_gradients, "triton": gpu_chunk.chunk_gradients}
_HSA = {"tpu": tpu_hsa.hsa_attention, "triton": gpu_hsa.hsa_attention}


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    pattern: Pattern,
    *,
    scale: float | None = None,
    segment_ids: Int32[Array, "B T"] | tuple[Int32[Array, "B T"], Int32[Array, "B S"]] | None = None,
    offset: Int[Array, ""] | int = 0,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention of T queries, the first of which has index `offset`, over S keys with indices 0 to S - 1.

    Differentiable in q, k, v and `sink_logits`, through both `out` and `lse` of the result. Blocks that the pattern
    rules out are neither loaded nor computed, forwards and backwards (FlashAttention-2, 2307.08691).

    Args:
      q, k, v: rotated queries and keys, values, bfloat16 or float32; H a multiple of K; products are summed in float32.
      pattern: which keys a query sees, by index.
      scale: factor on the logits, above 0; 1 / sqrt(D) where None.
      segment_ids: tokens see only their own segment; a pair gives queries' and keys' ids apart.
      offset: index of the first query, for a chunk deep in a sequence; may be traced.
      softcap: logits become `softcap * tanh(logits / softcap)`.
      slopes: ALiBi, `-slope * distance` added to the scaled logits; constants, their gradient is zero.
      sink_logits: a learned logit for each head that takes part in the softmax without a value (gpt-oss); `lse` has it.
      block_q, block_k: tokens of a block; by default those with the best schedules (docs/kernels.md).
      implementation: see the module.
      interpret: run the kernel in an interpreter, on any machine: `pltpu.InterpretParams()` or True.

    Raises:
      ValueError: shapes that do not fit together, a dtype that no kernel takes, or no kernel for the platform.
    """
    argument_checks.flash(q, k, v, segment_ids)
    scale = argument_checks.scale(scale, q)
    kernel = find(_FLASH, "attention kernel", implementation, "implementation='xla'")
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        segment_ids = (segment_ids, segment_ids)
    found: Partial = kernel(
        q, k, v, pattern, scale=scale, segment_ids=segment_ids, offset=offset, softcap=softcap, slopes=slopes,
        block_q=block_q, block_k=block_k, interpret=interpret,
    )  # fmt: skip
    return add_sink_logits(found, sink_logits)


def chunk_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "R B K S D"],
    v: Float[Array, "R B K S D"],
    pattern: Pattern,
    *,
    offset: Int[Array, ""] | int,
    row: Int[Array, ""] | int = 0,
    scale: float | None = None,
    segment_ids: tuple[Int32[Array, "B C"], Int32[Array, "B S"]] | None = None,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Partial:
    """`flash_attention` of one chunk of a sequence over the keys in a row of a buffer; not differentiable.

    With `chunk_gradients` it is what chunked backprop (StreamBP, 2506.03077) does with a chunk.

    Args:
      q: rotated queries, the first of which has index `offset`.
      k, v: buffers, of R layers, say, whose slots hold the keys with indices 0 to S - 1, the chunk's own among them.
        Slots behind the chunk's last token may hold anything finite.
      row: which of the R is meant.
      pattern, scale, segment_ids, softcap, slopes, implementation, interpret: as in `flash_attention`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    argument_checks.chunk(q, k, v)
    kernel = find(_CHUNK, "kernel for chunks", implementation, "XLA loops")
    return kernel(
        q, k, v, pattern, offset=jnp.asarray(offset, jnp.int32), row=row, segment_ids=segment_ids, softcap=softcap,
        slopes=slopes, interpret=interpret,
        scale=argument_checks.scale(scale, q),
    )  # fmt: skip


def chunk_gradients(
    q: Float[Array, "B C H D"],
    k: Float[Array, "R B K S D"],
    v: Float[Array, "R B K S D"],
    pattern: Pattern,
    part: Partial,
    d_out: Float[Array, "B C H D"],
    d_k: Float[Array, "R B K S D"],
    d_v: Float[Array, "R B K S D"],
    *,
    offset: Int[Array, ""] | int,
    row: Int[Array, ""] | int = 0,
    scale: float | None = None,
    segment_ids: tuple[Int32[Array, "B C"], Int32[Array, "B S"]] | None = None,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B C H D"], Float[Array, "R B K S D"], Float[Array, "R B K S D"]]:
    """The backward pass of `chunk_attention`: float32 gradient of q, and `d_k`, `d_v` with this chunk's part added.

    Args:
      q, k, v, pattern, offset, row, scale, segment_ids, softcap, slopes, implementation, interpret: as there.
      part: what `chunk_attention` returned.
      d_out: cotangent of its output.
      d_k, d_v: gradients of the keys and values so far, of any float dtype; only blocks that the chunk sees change.

    Raises:
      ValueError: as there.
    """
    argument_checks.chunk(q, k, v)
    kernel = find(_CHUNK_GRADIENTS, "kernel for chunks", implementation, "XLA loops")
    if d_k.shape != k.shape or d_v.shape != k.shape:
        raise ValueError(f"shapes d_k {d_k.shape}, d_v {d_v.shape}: use those of k and v, {k.shape}")
    return kernel(
        q, k, v, pattern, part, d_out, d_k, d_v, offset=jnp.asarray(offset, jnp.int32), row=row,
        segment_ids=segment_ids, softcap=softcap, slopes=slopes, interpret=interpret,
        scale=argument_checks.scale(scale, q),
    )  # fmt: skip


def hsa_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K P S D"],
    v: Float[Array, "B K P S D"],
    chosen: Int32[Array, "B K C N"],
    weights: Float[Array, "B K C N"],
    *,
    scale: float | None = None,
    block: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "B C H D"]:
    """Attention inside each of the pages that a query chose, by a softmax of its own, summed with given weights.

    The attention of hierarchical sparse attention (2504.16795, section 3). Differentiable in q, k, v and `weights`.
    Queries are grouped by the page that they chose, so work is products of dense matrices and grows with the choices,
    not with the pages; pages that nobody chose are not read, and their gradient is 0. The result is float32.

    Args:
      q, k, v: queries, and the keys and values of P pages of S tokens, all of which are seen; bfloat16 or float32; S a
        multiple of 8 (16 for bfloat16).
      chosen: pages that a query reads, for each key head; none twice; -1 for none.
      weights: what each page's output is multiplied with; where `chosen` is -1 they count for nothing.
      scale: factor on the logits, above 0; 1 / sqrt(D) where None.
      block: rows of a tile, each a query head of a query that reads the tile's page; by the shapes where None.
      implementation, interpret: as in `flash_attention`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    argument_checks.hsa(q, k, v, chosen, weights, block)
    scale = argument_checks.scale(scale, q)
    kernel = find(_HSA, "hsa kernel", implementation)
    return kernel(q, k, v, chosen, weights, scale=scale, block=block, interpret=interpret)
