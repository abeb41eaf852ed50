"""FlashAttention for Hopper GPUs as one differentiable function: forwards in Mosaic GPU, backwards in Triton."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_call import Call
from pallas_kernels.gpu import flash_attention as triton_flash
from pallas_kernels.padding import padded
from pallas_kernels.partial import Partial, named
from pallas_kernels.patterns import Pattern

WIDTHS = (64, 128, 256)
BLOCK_Q, BLOCK_K = 128, 128  # tokens


def available(interpret: bool = False) -> bool:
    """Whether the installed JAX compiles the kernel: older ones find no layouts. Interpreting it takes a newer one."""
    return jax.__version_info__ >= ((0, 12) if interpret else (0, 11, 2))


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    pattern: Pattern,
    *,
    scale: float,
    segment_ids: Any = None,
    offset: Int[Array, ""] | int = 0,
    softcap: float | None = None,
    slopes: Any = None,
    block_q: int | None = None,
    block_k: int | None = None,
    interpret: Any = False,
) -> Partial:
    """`pallas_kernels.api.flash_attention` on a Hopper GPU; see there for the arguments.

    block_q: 128 or 256 tokens, half of them for each consumer. block_k: 64, 128, 192 or 256 tokens. interpret:
    `plgpu.InterpretGPUParams()`, or True for the default ones.

    Raises:
      ValueError: what the kernel does not take, blocks that do not fit, or a JAX without what it is written in.
    """
    width = q.shape[-1]
    if not available(bool(interpret)):
        newer = "JAX 0.12 to interpret it" if available() else "JAX 0.11.2 or later"
        raise ValueError(f"JAX {jax.__version__} cannot run 'mosaic_gpu': use {newer}, or 'triton'")
    if q.dtype != jnp.bfloat16:
        raise ValueError(f"dtype {q.dtype}: 'mosaic_gpu' takes bfloat16; use 'triton'")
    if width not in WIDTHS:
        raise ValueError(f"heads of width {width}: 'mosaic_gpu' takes {', '.join(map(str, WIDTHS))}; use 'triton'")
    if segment_ids is not None or slopes is not None:
        raise ValueError("'mosaic_gpu' takes neither segment ids nor ALiBi's slopes; use 'triton'")
    from pallas_kernels.gpu.hopper import forward as hopper_forward

    block_q = block_q or BLOCK_Q
    block_k = block_k or (BLOCK_K if width <= 128 else BLOCK_K // 2)
    if block_q not in (128, 256) or block_k not in (64, 128, 192, 256):
        raise ValueError(f"blocks of {block_q} queries and {block_k} keys: use 128 or 256, and 64, 128, 192 or 256")
    if hopper_forward.stages(width, block_q, block_k) < 2:
        raise ValueError(
            f"blocks of {block_q} queries and {block_k} keys of width {width}: too large, use smaller ones"
        )
    params = hopper_forward.plgpu.InterpretGPUParams() if interpret is True else interpret
    # The gradients are Triton's, with blocks of its own, which divide the padded lengths too.
    backward_q, backward_k = triton_flash.block_sizes(q)
    shape = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    fixed: dict[str, Any] = {"scale": scale, "softcap": softcap, "slopes": None, "segment_ids": None}
    call = Call.make(*shape, pattern, block_q, block_k, interpret=params, **fixed)
    pulled = Call.make(*shape, pattern, backward_q, backward_k, interpret=bool(interpret), **fixed)
    block_k = max(block_k, backward_k)
    extra = {"offset": jnp.asarray(offset, jnp.int32)[None]}
    out, lse = _attention(
        call, pulled, *(padded(x, 1, b) for x, b in ((q, block_q), (k, block_k), (v, block_k))), extra
    )
    return Partial(out[:, : call.queries], jnp.swapaxes(lse, 1, 2)[:, : call.queries])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(call: Call, pulled: Call, q: Array, k: Array, v: Array, extra: dict[str, Array]) -> Any:
    from pallas_kernels.gpu.hopper.forward import forward

    return forward(call.settings, call.ranges(), extra["offset"], q, k, v, call.interpret)


def _forward(call: Call, pulled: Call, q: Array, k: Array, v: Array, extra: dict[str, Array]) -> Any:
    out, lse = named(_attention(call, pulled, q, k, v, extra))
    return (out, lse), (q, k, v, extra, out, lse)


def _backward(call: Call, pulled: Call, saved: Any, cotangents: tuple[Array, Array]) -> Any:
    return triton_flash.attention_vjp(pulled, saved, cotangents)


_attention.defvjp(_forward, _backward)
