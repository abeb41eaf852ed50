"""The part of `benchmarks/kernels/gpu/all_kernels.py` about attention of whole sequences, forwards and backwards.

On a Hopper GPU "streamjax mosaic_gpu" is beside "streamjax", which is the Triton kernel: their rows decide which of the
two `platform_implementation` ought to give there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.gpu import torch_flash
from benchmarks.kernels.gpu.parts import Device, Foreign, Line, copies, exact, worst
from benchmarks.model_shapes import SHAPES
from pallas_kernels import api, reference
from pallas_kernels.patterns import Full, Pattern, SinkWindow, SlidingWindow

PATTERNS: Mapping[str, Pattern] = {
    "causal": Full(),
    "local": SlidingWindow(4096),
    "sinks": SinkWindow(4, 4096),
}
NAMES = tuple(PATTERNS)
KERNELS = ("triton", "mosaic_gpu")
LOGITS_TOKENS = 8192  # longer sequences are too much for a side that holds all logits
Side = Callable[..., Any]


def pairs(pattern: Pattern, length: int, first: int = 0) -> int:
    """Pairs of a query and a key that count, of the queries from the `first` on."""

    def before(length: int) -> int:
        window = pattern.window or length
        full = min(window, length)
        inside = full * (full + 1) // 2 + (length - full) * full
        late = range(window, length)
        return inside + sum(min(pattern.sinks, t - window + 1) for t in late) if pattern.sinks else inside

    return before(length) - before(first)


def shortened(pattern: Pattern, length: int) -> Pattern:
    """The pattern with a window that `length` tokens are several times longer than."""
    return pattern if isinstance(pattern, Full) else dataclasses.replace(pattern, window=length // 4)


def inputs(model: str, length: int, seed: int, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
    """q, k, v and the output's cotangent."""
    config = SHAPES[model]
    shapes = [(1, length, n, config.head_dim) for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, [*shapes, shapes[0]], strict=True)]


def ours(
    pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array, kernel: Any = "triton", interpret: bool = False
) -> jax.Array:
    found = api.flash_attention(q, k, v, pattern, implementation=kernel, interpret=interpret)
    return found.out.astype(q.dtype)


def by_jax(implementation: str, pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    window = pattern.window
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation=implementation)


def by_tokamax(pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    import tokamax

    window = pattern.window
    local = None if window is None else (window - 1, 0)
    found: jax.Array = tokamax.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)
    return found


def sides(pattern: Pattern, length: int, kernels: Sequence[str]) -> dict[str, Side]:
    """What is timed of JAX: our `kernels`, and whoever has the pattern (nobody else has sinks)."""
    found: dict[str, Side] = {}
    for kernel in kernels:
        found["streamjax" + (f" {kernel}" if kernel != "triton" else "")] = partial(ours, pattern, kernel=kernel)
    if not pattern.sinks:
        found["jax cudnn"] = partial(by_jax, "cudnn", pattern)
        if length <= LOGITS_TOKENS:
            found["jax xla"] = partial(by_jax, "xla", pattern)
        if importlib.util.find_spec("tokamax"):
            found["tokamax"] = partial(by_tokamax, pattern)
    return found


def backward(side: Side, q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
    """Output and gradients."""
    out, pull = jax.vjp(side, q, k, v)
    return out, pull(d_out)


def errors(
    model: str,
    name: str,
    kernel: str = "triton",
    dtype: Any = jnp.bfloat16,
    length: int = 1500,
    interpret: bool = False,
) -> float:
    """Largest relative error of output and gradients against float64, with a window that is short for `length`."""
    pattern, arrays = shortened(PATTERNS[name], length), inputs(model, length, 0, dtype)
    mine = jax.jit(partial(backward, partial(ours, pattern, kernel=kernel, interpret=interpret)))(*arrays)
    with jax.enable_x64(True):
        scale = float(SHAPES[model].head_dim) ** -0.5

        def plain(q: Any, k: Any, v: Any) -> Any:
            return reference.flash_attention(q, k, v, pattern, scale=scale).out

        return worst(mine, jax.jit(partial(backward, plain))(*exact(arrays)))


def measure(model: str, name: str, length: int, kernels: Sequence[str], device: Device) -> list[Line]:
    """A line for each side and direction."""
    pattern, config, lines = PATTERNS[name], SHAPES[model], []
    work = 4 * pairs(pattern, length) * config.num_heads * config.head_dim  # two products forwards, five backwards
    sets = copies(partial(inputs, model, length))
    for direction, factor in (("forward", 1.0), ("both", 3.5)):
        found = sides(pattern, length, kernels)
        programs: dict[str, Side | Foreign] = dict(found)
        if direction == "both":
            programs = {side: partial(backward, f) for side, f in found.items()}
        if pattern == Full() and importlib.util.find_spec("torch"):
            programs["torch flash"] = torch_flash.flash(direction == "both")
        arrays = [x[:3] if direction == "forward" else x for x in sets]
        labels = {"model": model, "pattern": name, "tokens": length, "direction": direction}
        lines += device.lines(programs, arrays, "TFLOP/s", factor * work, **labels)
    return lines
