"""FlashAttention for GPUs, in Triton (Ampere and later), as one differentiable function."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.call import Call, no_gradient, safe
from pallas_kernels.gpu import flash_backward
from pallas_kernels.gpu.flash_forward import forward
from pallas_kernels.partial import Partial
from pallas_kernels.patterns import Pattern

MAX_WIDTH = 256
BLOCK_Q, BLOCK_K = 128, 64  # tokens


def blocks(width: int, dtype: Any) -> tuple[int, int]:
    """Tokens of a block of queries and of keys, where nothing else is asked for."""
    halves = 1 if width <= 128 and dtype != jnp.float32 else 2
    return BLOCK_Q // halves, BLOCK_K // halves


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
      ValueError: heads wider than the kernel takes, or blocks of another size.
    """
    width = q.shape[-1]
    if width > MAX_WIDTH:
        raise ValueError(f"heads of width {width}: the Triton kernel takes {MAX_WIDTH} at most; use 'xla'")
    usual = blocks(width, q.dtype)
    block_q, block_k = block_q or usual[0], block_k or usual[1]
    for block in (block_q, block_k):
        if block < 16 or block & (block - 1):
            raise ValueError(f"blocks of {block_q} queries and {block_k} keys: use powers of two from 16")
    call = Call.make(
        q, k, pattern, block_q, block_k, scale=scale, softcap=softcap, slopes=slopes, segment_ids=segment_ids,
        interpret=interpret,
    )  # fmt: skip

    def pad(x: Array, block: int) -> Array:
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))

    extra = {"offset": jnp.asarray(offset, jnp.int32)[None]}
    if slopes is not None:
        extra["slopes"] = slopes.astype(jnp.float32)
    if segment_ids is not None:
        extra["query_ids"] = pad(segment_ids[0].astype(jnp.int32), block_q)
        extra["key_ids"] = pad(segment_ids[1].astype(jnp.int32), block_k)
    out, lse = _attention(call, pad(q, block_q), pad(k, block_k), pad(v, block_k), extra)
    return Partial(out[:, : call.queries], jnp.swapaxes(lse, 1, 2)[:, : call.queries])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, q: Array, k: Array, v: Array, extra: dict[str, Array]) -> Any:
    return forward(call.settings, call.ranges(), {"q": q, "k": k, "v": v, **extra}, call.interpret)


def _forward(call: Call, q: Array, k: Array, v: Array, extra: dict[str, Array]) -> Any:
    out, lse = _attention(call, q, k, v, extra)
    return (out, lse), (q, k, v, extra, out, lse)


def gradients(call: Call, saved: Any, cotangents: tuple[Array, Array]) -> Any:
    """Gradients of q, k and v, none of the rest, by what the forward pass had and found and its results' cotangents."""
    q, k, v, extra, out, lse = saved
    d_out, d_lse = cotangents
    d_out = d_out.astype(q.dtype)  # as the kernels multiply it: `shift` must cancel against the same numbers
    operands = {"q": q, "k": k, "v": v, **extra} | {
        "d_out": d_out,
        "lse": safe(lse),
        "shift": d_lse - jnp.swapaxes(jnp.sum(d_out.astype(out.dtype) * out, axis=-1), 1, 2),
    }
    settings, transposed = call.settings, call.ranges(transposed=True)
    d_q = flash_backward.query_gradients(settings, call.ranges(), operands, call.interpret)
    d_k, d_v = flash_backward.key_gradients(settings, transposed, operands, call.interpret)
    if settings.sinks and settings.window is not None:
        sinks = flash_backward.sink_gradients(settings, call.ranges(), operands, call.interpret)
        count = settings.sinks
        d_k, d_v = (x.at[:, :count].add(y[:, :count]) for x, y in zip((d_k, d_v), sinks, strict=True))

    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), no_gradient(extra)


_attention.defvjp(_forward, gradients)
