"""FlashAttention for GPUs, in Triton (Ampere and later), as one differentiable function."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.flash_call import Call, no_gradient, safe
from pallas_kernels.gpu import flash_backward
from pallas_kernels.gpu.flash_forward import forward
from pallas_kernels.padding import padded
from pallas_kernels.partial import Partial, named
from pallas_kernels.patterns import Pattern
from pallas_kernels.tile_logits import Settings

MAX_WIDTH = 256
BLOCK_Q, BLOCK_K = 128, 64  # tokens
# For keys' gradients, in bfloat16: with more queries registers spill, with more keys wide heads take too much shared
# memory where there are sinks (docs/kernels.md).
GRADIENT_Q, WIDE_GRADIENT_K = 64, 32


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    pattern: Pattern,
    *,
    scale: float,
    segment_ids: tuple[Int32[Array, "B T"], Int32[Array, "B S"]] | None = None,
    offset: Int[Array, ""] | int = 0,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    interpret: bool = False,
) -> Partial:
    """`pallas_kernels.api.flash_attention` on a GPU; see there for the arguments.

    block_q, block_k: tokens of a block, powers of two from 16. interpret: run in Pallas's interpreter.

    Raises:
      ValueError: see `block_sizes`.
    """
    block_q, block_k = block_sizes(q, block_q, block_k)
    call = Call.make(
        q.shape[1], k.shape[1], q.shape[2] // k.shape[2], pattern, block_q, block_k, scale=scale, softcap=softcap,
        slopes=slopes, segment_ids=segment_ids, interpret=interpret,
    )  # fmt: skip
    extra = extra_operands(call, offset, slopes, segment_ids)
    out, lse = _attention(call, padded(q, 1, block_q), padded(k, 1, block_k), padded(v, 1, block_k), extra)
    return Partial(out[:, : call.queries], jnp.swapaxes(lse, 1, 2)[:, : call.queries])


def block_sizes(q: Array, block_q: int | None = None, block_k: int | None = None) -> tuple[int, int]:
    """Tokens of a block of queries and of keys: those that are given, or what suits the width.

    Raises:
      ValueError: heads wider than the kernel takes, or blocks that are not powers of two from 16.
    """
    width = q.shape[-1]
    if width > MAX_WIDTH:
        raise ValueError(f"heads of width {width}: the Triton kernel takes {MAX_WIDTH} at most; use 'xla'")
    wide, exact = width > 128, q.dtype == jnp.float32  # each take twice the shared memory
    found = block_q or BLOCK_Q >> wide + exact, block_k or BLOCK_K >> (exact and 1 + wide)
    if any(block < 16 or block & (block - 1) for block in found):
        raise ValueError(f"blocks of {found[0]} queries and {found[1]} keys: use powers of two from 16")
    return found


def extra_operands(call: Call, offset: Any, slopes: Array | None, segment_ids: Any) -> dict[str, Array]:
    """What the kernels read beside queries, keys and values."""
    found = {"offset": jnp.asarray(offset, jnp.int32)[None]}
    if slopes is not None:
        found["slopes"] = slopes.astype(jnp.float32)
    if segment_ids is not None:
        found["query_ids"] = padded(segment_ids[0].astype(jnp.int32), 1, call.block_q)
        found["key_ids"] = padded(segment_ids[1].astype(jnp.int32), 1, call.block_k)
    return found


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, q: Array, k: Array, v: Array, extra: dict[str, Array]) -> Any:
    return forward(call.settings, call.ranges(), {"q": q, "k": k, "v": v, **extra})


def _forward(call: Call, q: Array, k: Array, v: Array, extra: dict[str, Array]) -> Any:
    out, lse = named(_attention(call, q, k, v, extra))
    return (out, lse), (q, k, v, extra, out, lse)


def attention_vjp(call: Call, saved: Any, cotangents: tuple[Array, Array]) -> Any:
    """Gradients of q, k and v, none of the rest, by what the forward pass had and found and its results' cotangents."""
    q, k, v, extra, out, lse = saved
    d_out, d_lse = cotangents
    d_q, d_k, d_v = gradients(call, {"q": q, "k": k, "v": v, **extra}, (out, lse), d_out, d_lse)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), no_gradient(extra)


def gradients(
    call: Call,
    operands: dict[str, Array],
    found: tuple[Float[Array, "B P H D"], Float[Array, "B H P"]],
    d_out: Float[Array, "B P H D"],
    d_lse: Float[Array, "B H P"] | float,
    sums: tuple[Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v from what the forward pass read and `found`; added to `sums` where they are given."""
    settings, (out, lse) = call.settings, found
    # As the kernels multiply it: `shift` must cancel against the same numbers.
    d_out = d_out.astype(operands["q"].dtype)
    operands = operands | {
        "d_out": d_out,
        "lse": safe(lse),
        "shift": d_lse - jnp.swapaxes(jnp.sum(d_out.astype(out.dtype) * out, axis=-1), 1, 2),
    }
    d_q = flash_backward.query_gradients(settings, call.ranges(), operands)
    more = {} if sums is None else {"d_k": sums[0], "d_v": sums[1]}
    by_key = call.ranges(transposed=True)
    by_key = dataclasses.replace(by_key, block_q=min(call.block_q, GRADIENT_Q * 2 // operands["q"].dtype.itemsize))
    if operands["q"].shape[-1] > 128:
        by_key = dataclasses.replace(by_key, block_k=min(call.block_k, WIDE_GRADIENT_K))
    d_k, d_v = flash_backward.key_gradients(settings, by_key, operands | more)
    if settings.sinks and settings.window is not None:
        sinks = flash_backward.sink_gradients(settings, call.ranges(), operands)
        d_k, d_v = (_with_sinks(settings, x, y[:, : settings.sinks]) for x, y in zip((d_k, d_v), sinks, strict=True))
    return d_q, d_k, d_v


def _with_sinks(settings: Settings, grads: Array, sinks: Float[Array, "B N K D"]) -> Array:
    """Gradients of keys with those of the sinks added."""
    sinks = sinks.astype(grads.dtype)
    if settings.heads_first:
        return grads.at[:, :, : settings.sinks].add(jnp.swapaxes(sinks, 1, 2))
    return grads.at[:, : settings.sinks].add(sinks)


_attention.defvjp(_forward, attention_vjp)
