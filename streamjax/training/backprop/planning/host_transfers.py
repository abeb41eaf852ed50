"""`offload_fraction="auto"`: as much of layers' inputs goes to the host's memory as costs no time (MEMO, 2407.12117).

What a layer keeps is sent while the layer computes, and fetched while its gradient is computed. So the share that may
be moved follows from bytes, bandwidth and compute time. It grows with the length of sequences, since attention takes
ever longer and a token's bytes stay the same; behind some length all can be moved.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from streamjax.models.config import (
    BlockConfig,
    DenseAndExpertsConfig,
    ExpertsConfig,
    ModelConfig,
    UniformConfig,
    expanded,
)
from streamjax.models.config.recurrent import RecurrentConfig
from streamjax.training.backprop.planning.layer_bytes import found_numbers
from streamjax.training.backprop.planning.memory_model import DEFAULT_CHUNK

_BYTES = 2**26  # of an array whose way to the host and back is measured
_SIZE = 2048  # of square matrices whose product is measured
_TURNS = 5
_BACKWARD = 3  # the gradient of a layer takes so many times its forward pass, with what is computed again
_FETCHES = 2  # the backward pass of a layer reads its input twice: for all keys, and chunk by chunk


class Rates(NamedTuple):
    """What a device does in a second: bytes to the host's memory, bytes from it, and floating-point operations."""

    to_host: float
    from_host: float
    flops: float


def hidden_fraction(
    config: ModelConfig | UniformConfig,
    rates: Rates,
    *,
    batch_size: int,
    length: int,
    host_bytes: float,
    chunk_size: int | None = None,
    keep_attention: bool = False,
    item: int = 2,
    shards: int = 1,
) -> float:
    """The largest share of layers' inputs, in whole chunks, whose way to the host and back is shorter than compute.

    Args:
      config: the model.
      rates: of the device and of its link to the host.
      batch_size, length: rows and tokens on one device.
      host_bytes: of the host's memory that may be used for one device.
      chunk_size, keep_attention: as in `loss_and_grad`.
      item: bytes of a number.
      shards: devices along `tensor`, which share a layer's compute and each keep its input.
    """
    config = expanded(config)
    chunk = min(chunk_size or DEFAULT_CHUNK, length)
    count = math.ceil(length / chunk)
    tokens, width = batch_size * count * chunk, 0
    if keep_attention:
        width = max(map(found_numbers, config.blocks)) // shards
    size = tokens * (config.d_model * item + width * max(item, 4))
    flops = min(_forward_flops(block, config.d_model, batch_size, length) for block in config.blocks)
    seconds = flops / shards / rates.flops
    shares = (
        seconds * rates.to_host / size,
        _BACKWARD * seconds * rates.from_host / (_FETCHES * size),
        host_bytes / (config.num_layers * size),
        1.0,
    )
    return math.floor(min(shares) * count + 1e-9) / count


def measure_rates(dtype: Any) -> Rates:
    """What the first device of this process does; takes about a second."""
    device = jax.local_devices()[0]
    here = jax.device_put(jnp.zeros(_BYTES, jnp.uint8), device)
    to_host = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Host))
    from_host = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Device))
    away = jax.block_until_ready(to_host(here))
    square = jax.device_put(jnp.zeros((_SIZE, _SIZE), dtype), device)
    product = jax.jit(lambda x: x @ x)
    return Rates(
        _BYTES / _seconds(lambda: to_host(here)),
        _BYTES / _seconds(lambda: from_host(away)),
        2 * _SIZE**3 / _seconds(lambda: product(square)),
    )


def _seconds(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    found = []
    for _ in range(_TURNS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _forward_flops(block: BlockConfig, d_model: int, rows: int, length: int) -> float:
    """Of one layer: two for each token and parameter that it meets, and attention to what it sees."""
    met = block.parameter_count(d_model)
    mlp = block.mlp.experts if isinstance(block.mlp, DenseAndExpertsConfig) else block.mlp
    if isinstance(mlp, ExpertsConfig):
        left_out = mlp.num_experts - mlp.experts_per_token
        met -= left_out * mlp.expert_parameters(d_model)
    flops = 2.0 * rows * length * met
    mixer = block.mixer
    if not isinstance(mixer, RecurrentConfig):
        seen = min(getattr(mixer, "window", None) or length, length)
        pairs = length * seen - seen * (seen - 1) / 2
        if chunk := getattr(mixer, "chunk", None):  # attention within chunks
            pairs = length * (min(chunk, length) + 1) / 2
        flops += 4.0 * rows * pairs * mixer.num_heads * mixer.head_dim
    return flops
