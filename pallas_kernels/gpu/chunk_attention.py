"""Attention of one chunk of a sequence to a buffer of keys, forwards and backwards, on GPUs: chunked backprop's steps.

The kernels are those of flash attention. They read the buffer where it lies, and gradients of keys are added to
another buffer in place. Of buffers with several rows one is cut out, and put back: Triton's blocks cannot depend on
numbers that are only known when the kernel runs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.flash_call import Call
from pallas_kernels.gpu.flash_attention import block_sizes, extra_operands, gradients
from pallas_kernels.gpu.flash_forward import forward
from pallas_kernels.padding import padded
from pallas_kernels.partial import Partial
from pallas_kernels.patterns import Pattern


def chunk_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "R B K S D"],
    v: Float[Array, "R B K S D"],
    pattern: Pattern,
    *,
    row: Int[Array, ""] | int,
    **known: Any,
) -> Partial:
    """`pallas_kernels.api.chunk_attention` on a GPU; see there for the arguments.

    Raises:
      ValueError: heads wider than the kernel takes, or a buffer that is not whole blocks of keys.
    """
    call, operands = _prepare(q, _row(k, row), _row(v, row), pattern, **known)
    out, lse = forward(call.settings, call.ranges(), operands)
    return Partial(out[:, : call.queries], jnp.swapaxes(lse, 1, 2)[:, : call.queries])


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
    row: Int[Array, ""] | int,
    **known: Any,
) -> tuple[Float[Array, "B C H D"], Float[Array, "R B K S D"], Float[Array, "R B K S D"]]:
    """`pallas_kernels.api.chunk_gradients` on a GPU; see there for the arguments."""
    call, operands = _prepare(q, _row(k, row), _row(v, row), pattern, **known)
    lse = jnp.swapaxes(padded(part.lse, 1, call.block_q), 1, 2)
    out, d_out = padded(part.out, 1, call.block_q), padded(d_out, 1, call.block_q)
    d_q, *added = gradients(call, operands, (out, lse), d_out, 0.0, (_row(d_k, row), _row(d_v, row)))
    d_k, d_v = (
        jax.lax.dynamic_update_index_in_dim(sums, new, row, 0) for sums, new in zip((d_k, d_v), added, strict=True)
    )
    return d_q[:, : call.queries], d_k, d_v


def _row(x: Float[Array, "R B K S D"], row: Any) -> Float[Array, "B K S D"]:
    return x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, row, 0, keepdims=False)


def _prepare(
    q: Array,
    k: Array,
    v: Array,
    pattern: Pattern,
    *,
    offset: Int[Array, ""],
    scale: float,
    segment_ids: tuple[Int32[Array, "B C"], Int32[Array, "B S"]] | None,
    softcap: float | None,
    slopes: Float[Array, " H"] | None,
    interpret: Any,
) -> tuple[Call, dict[str, Array]]:
    """What is static, and the operands."""
    block_q, block_k = block_sizes(q)
    slots = k.shape[2]
    if slots % block_k:
        raise ValueError(f"a buffer of {slots} slots: the Triton kernel takes a multiple of {block_k} here")
    call = Call.make(
        q.shape[1], slots, q.shape[2] // k.shape[1], pattern, block_q, block_k, scale=scale, softcap=softcap,
        slopes=slopes, segment_ids=segment_ids, interpret=interpret, heads_first=True,
    )  # fmt: skip
    return call, {"q": padded(q, 1, block_q), "k": k, "v": v, **extra_operands(call, offset, slopes, segment_ids)}
