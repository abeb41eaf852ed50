"""Torch's flash attention as a side of `all_kernels`: the same arrays, taken over without a copy.

Torch is imported by the functions of a side, so that one that cannot be is a side that cannot run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.kernels.gpu.parts import Foreign


def flash(backward: bool) -> Foreign:
    """Causal attention of q, k, v [B, T, heads, D], and with `backward` gradients along a cotangent behind them."""

    def prepare(arrays: Sequence[jax.Array]) -> list[Any]:
        import torch

        tensors = [torch.from_dlpack(x).transpose(1, 2) for x in arrays]
        return [x.requires_grad_(backward and i < 3) for i, x in enumerate(tensors)]

    return Foreign(_both if backward else _forward, prepare, _wait)


def _forward(q: Any, k: Any, v: Any) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _both(q: Any, k: Any, v: Any, d_out: Any) -> Any:
    import torch

    out = _forward(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), d_out)


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
