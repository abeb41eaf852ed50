"""Attention of one chunk of a sequence to a buffer of keys, forwards and backwards, on TPUs: chunked backprop's steps.

The kernels are those of flash attention. They read the buffer where it lies, and gradients of keys are added to another
buffer in place: blocks that the chunk does not see are neither read nor written.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.flash_call import Call
from pallas_kernels.padding import padded
from pallas_kernels.partial import Partial
from pallas_kernels.patterns import Pattern
from pallas_kernels.tpu.flash_attention import (
    BLOCK_K,
    BLOCK_Q,
    MAX_SINKS,
    all_operands,
    extra_operands,
    gradients,
    partial_of,
)
from pallas_kernels.tpu.flash_forward import forward
from pallas_kernels.tpu.tiles import LANES

Settings = dict[str, Any]


def chunk_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "R B K S D"],
    v: Float[Array, "R B K S D"],
    pattern: Pattern,
    *,
    offset: Int[Array, ""],
    row: Int[Array, ""] | int,
    **known: Any,
) -> Partial:
    """`pallas_kernels.api.chunk_attention` on a TPU; see there for the arguments.

    Raises:
      ValueError: the sinks are more than the kernel holds, or the slots are not whole blocks of 128.
    """
    call, (q_first, k, v), extra = _prepare(q, k, v, pattern, **known)
    operands = all_operands(call, q_first, k, v, extra, row)
    return partial_of(call, *forward(call.settings, call.ranges(), operands, offset, call.interpret, row))


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
    offset: Int[Array, ""],
    row: Int[Array, ""] | int,
    **known: Any,
) -> tuple[Float[Array, "B C H D"], Float[Array, "R B K S D"], Float[Array, "R B K S D"]]:
    """`pallas_kernels.api.chunk_gradients` on a TPU; see there for the arguments."""
    call, (q_first, k, v), extra = _prepare(q, k, v, pattern, **known)
    out, d_out = (padded(jnp.swapaxes(x, 1, 2), 2, call.block_q) for x in (part.out, d_out))
    lse = padded(jnp.swapaxes(part.lse, 1, 2)[:, :, None], 3, call.block_q)
    operands = all_operands(call, q_first, k, v, extra, row)
    d_q, d_k, d_v = gradients(call, operands, extra, (out, lse), d_out, 0.0, offset, row, (d_k, d_v))
    return jnp.swapaxes(d_q, 1, 2)[:, : call.queries], d_k, d_v


def _prepare(
    q: Array,
    k: Array,
    v: Array,
    pattern: Pattern,
    *,
    scale: float,
    segment_ids: tuple[Int32[Array, "B C"], Int32[Array, "B S"]] | None,
    softcap: float | None,
    slopes: Float[Array, " H"] | None,
    interpret: Any,
) -> tuple[Call, tuple[Array, Array, Array], dict[str, Array]]:
    """What is static; q heads first, k and v; and the other operands."""
    slots = k.shape[3]
    if min(pattern.sinks, slots) > MAX_SINKS:
        raise ValueError(f"{pattern.sinks} sinks: the TPU kernel takes {MAX_SINKS} at most; use streamjax's XLA loops")
    if slots % LANES:
        raise ValueError(f"a buffer of {slots} slots: the TPU kernel takes a multiple of {LANES}")
    block_q = min(BLOCK_Q, -(-q.shape[1] // LANES) * LANES)
    block_k = next(size for size in (BLOCK_K, BLOCK_K // 2, BLOCK_K // 4, LANES) if slots % size == 0)
    call = Call.make(
        q.shape[1], slots, q.shape[2] // k.shape[2], pattern, block_q, block_k, scale=scale, softcap=softcap,
        slopes=slopes, segment_ids=segment_ids, interpret=interpret,
    )  # fmt: skip
    heads_first: jax.Array = padded(jnp.swapaxes(q, 1, 2), 2, block_q)
    return call, (heads_first, k, v), extra_operands(call, slopes, segment_ids)
