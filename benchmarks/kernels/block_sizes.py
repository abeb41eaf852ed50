"""Blockwise attention on this machine by the size of its blocks, for `streamjax.attention.blockwise.block_sizes`.

    python -m benchmarks.kernels.block_sizes

Seconds, and CPU seconds of all threads, of forward and backward passes over 2,048 tokens, causal, key heads of width 64
for three query heads each; the medians of five runs. `taken` is what `block_sizes` says.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.reporting import report
from pallas_kernels.patterns import Full
from streamjax.attention.blockwise import block_sizes
from streamjax.attention.flash import flash_attention

LENGTH, WIDTH, HEADS = 2048, 64, (3, 9, 15, 24, 36, 72)
SIZES = [(512, 128), (256, 256), (256, 128), (192, 128), (128, 256), (128, 128), (64, 128)]


def seconds(function: Callable[..., Array], *args: Array) -> tuple[float, float]:
    """Wall and CPU."""
    jax.block_until_ready(function(*args))
    spent = []
    for _ in range(5):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(function(*args))
        spent.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return statistics.median(wall for wall, _ in spent), statistics.median(cpu for _, cpu in spent)


def main() -> None:
    rows = []
    for heads in HEADS:
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = [(1, LENGTH, count, WIDTH) for count in (heads, heads // 3, heads // 3)]
        q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
        for block_q, block_k in SIZES:

            def attend(q: Array, k: Array, v: Array, block_q: int = block_q, block_k: int = block_k) -> Array:
                return flash_attention(q, k, v, Full(), scale=WIDTH**-0.5, block_q=block_q, block_k=block_k).out

            gradient = jax.grad(lambda *args, attend=attend: jnp.sum(attend(*args)), argnums=(0, 1, 2))
            forward, both = seconds(jax.jit(attend), q, k, v), seconds(jax.jit(gradient), q, k, v)
            row = {"query heads": heads, "queries": block_q, "keys": block_k, "forward s": forward[0]}
            row |= {"forward CPU s": forward[1], "both s": both[0], "both CPU s": both[1]}
            row["GFLOP per s"] = 3.5 * 2 * LENGTH * LENGTH * heads * WIDTH / both[0] / 1e9
            row["taken"] = "yes" if (block_q, block_k) == block_sizes() else ""
            rows.append(row)
    report("kernels/block_sizes", rows)


if __name__ == "__main__":
    main()
