"""Which kernels there are for the platform that JAX runs on, and what they take."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.argument_checks import DTYPES
from pallas_kernels.coded import Coded
from pallas_kernels.gpu import flash_attention as gpu_flash
from pallas_kernels.gpu.recurrence.chunkwise import MAX_STATE
from pallas_kernels.gpu.slot_attention import MAX_WIDTH
from pallas_kernels.patterns import Chunked, Pattern
from pallas_kernels.tpu.flash_attention import MAX_SINKS
from pallas_kernels.tpu.tiles import LANES, SUBLANES
from pallas_kernels.tpu.token_stats import MAX_BYTES
from pallas_kernels.unpacking.protocol import Unpackable

Implementation = Literal["tpu", "triton", "mosaic_gpu"]


def platform_implementation() -> Implementation | None:
    """The kernels for the platform that JAX runs on; None where there are none."""
    return {"tpu": "tpu", "gpu": "triton"}.get(jax.default_backend())  # type: ignore[return-value]


def takes(pattern: Pattern, dtype: str) -> bool:
    """Whether `flash_attention` takes a pattern and a dtype on the platform that JAX runs on."""
    chosen = platform_implementation()
    if chosen is None or dtype not in DTYPES or isinstance(pattern, Chunked):
        return False
    return chosen != "tpu" or pattern.sinks <= MAX_SINKS


def takes_cache(width: int, slots: int, dtype: str) -> bool:
    """Whether `decode_attention` and `paged_attention` take a cache on the platform that JAX runs on, and as it lies.

    Where slots do not fill a TPU's tiles, or heads not its lanes, its compiler lays the cache out with other dimensions
    inside: all of it would be copied at every step.
    """
    chosen = platform_implementation()
    if chosen is None or dtype not in DTYPES:
        return False
    if chosen == "triton":
        return width <= MAX_WIDTH
    return width % LANES == 0 and slots % (32 // jnp.dtype(dtype).itemsize) == 0


def takes_codes(k: Coded | Unpackable | None, page: int | None = None) -> bool:
    """Whether `decode_attention`, or `paged_attention` of pages, takes these keys on the platform that JAX runs on."""
    chosen = platform_implementation()
    if chosen not in ("tpu", "triton") or k is None:
        return False
    if isinstance(k, Unpackable):
        fits = k.shape[3] <= MAX_WIDTH if chosen == "triton" else page is None and k.shape[3] % LANES == 0
        return fits and k.unpacking.refused_by(chosen) is None
    if chosen == "triton":
        return k.shape[3] <= MAX_WIDTH
    if k.shape[3] % LANES or k.rows % SUBLANES or (k.order is not None and k.shape[3] != LANES):
        return False
    return page is None or page // k.planes % (4 * SUBLANES) == 0  # whole tiles of bytes


def takes_buffer(pattern: Pattern, slots: int, width: int, dtype: str) -> bool:
    """Whether `chunk_attention` takes a buffer on the platform that JAX runs on."""
    if platform_implementation() == "triton":
        return takes(pattern, dtype) and width <= MAX_WIDTH and slots % gpu_flash.BLOCK_K == 0
    return takes(pattern, dtype) and slots % LANES == 0


def takes_tokens(width: int, dtype: str) -> bool:
    """Whether `token_stats` takes hidden states on the platform that JAX runs on; GPUs have no such kernel."""
    if platform_implementation() != "tpu" or dtype not in DTYPES:
        return False
    return width * jnp.dtype(dtype).itemsize <= MAX_BYTES


def takes_states(keys: int, width: int, dtype: str) -> bool:
    """Whether `delta_update` takes states of `keys` x `width` on the platform that JAX runs on, and as they lie.

    A TPU's compiler lays states whose columns do not fill its lanes out the other way round, and turns whole tiles of
    queries and keys. Triton's blocks are powers of two.
    """
    chosen = platform_implementation()
    if chosen is None or dtype != "float32":
        return False
    if chosen == "triton":
        return all(size >= 16 and size & (size - 1) == 0 for size in (keys, width)) and keys <= 256
    return keys % LANES == 0 and width % LANES == 0


def takes_blocks(shape: tuple[int, ...], state: Any, dtype: Any) -> bool:
    """Whether `chunkwise_recurrence` takes states `[B, G, R, K, V]` and operands of a dtype on the platform of JAX.

    On TPUs rows are whole lanes, and so are the columns of one head or of two that share a key. On GPUs both are powers
    of two, and a head's are a program's registers.
    """
    chosen, (shared, keys, width) = platform_implementation(), shape[2:]
    if chosen is None or jnp.dtype(state) != jnp.float32 or jnp.dtype(dtype).name not in DTYPES:
        return False
    if chosen == "triton":
        return all(16 <= size <= MAX_STATE and size & (size - 1) == 0 for size in (keys, width))
    return keys % LANES == 0 and (width % LANES == 0 or (2 * width % LANES == 0 and shared % 2 == 0))


@cache
def log_choice(what: str, choice: str) -> None:
    """Tell the log, once, what something is computed by on the platform that JAX runs on."""
    logging.getLogger(__name__).info("%s: %s, on %s", what, choice, jax.default_backend())


def find(kernels: dict[str, Any], what: str, implementation: str | None, otherwise: str = "XLA path") -> Any:
    """The kernel of an implementation, or of the platform.

    Raises:
      ValueError: there is none.
    """
    chosen = implementation or platform_implementation()
    if chosen not in kernels:
        raise ValueError(f"no {what} for {chosen or jax.default_backend()}; use streamjax's {otherwise}")
    return kernels[chosen]
