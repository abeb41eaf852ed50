"""Blockwise attention on this machine by the size of its blocks, for `streamjax.attention.blockwise.block_sizes`.

    python -m benchmarks.kernels.block_sizes

CPU seconds (of all threads) of the forward pass, and of forward and backward, 8 query heads and 2 key heads of width
64, causal; the smallest of three runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.reporting import report
from pallas_kernels.patterns import Full
from streamjax.attention.flash import flash_attention

LENGTH, HEADS, KV_HEADS, WIDTH = 4096, 8, 2, 64
SIZES = [(512, 512), (256, 512), (256, 256), (256, 128), (128, 256), (128, 128), (64, 128)]


def cpu_seconds(function: Callable[..., Array], *args: Array) -> float:
    """The least of three runs."""
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        jax.block_until_ready(function(*args))
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, LENGTH, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    rows = []
    for block_q, block_k in SIZES:

        def attend(q: Array, k: Array, v: Array, block_q: int = block_q, block_k: int = block_k) -> Array:
            return flash_attention(q, k, v, Full(), scale=WIDTH**-0.5, block_q=block_q, block_k=block_k).out

        gradient = jax.grad(lambda *args, attend=attend: jnp.sum(attend(*args)), argnums=(0, 1, 2))
        forward, both = cpu_seconds(jax.jit(attend), q, k, v), cpu_seconds(jax.jit(gradient), q, k, v)
        flops = 2 * LENGTH * LENGTH * HEADS * WIDTH
        rows.append(
            {
                "queries": block_q,
                "keys": block_k,
                "forward, CPU s": forward,
                "forward and backward": both,
                "GFLOP per CPU s": 3.5 * flops / both / 1e9,
            }
        )
    report("kernels/block_sizes", rows)


if __name__ == "__main__":
    main()
