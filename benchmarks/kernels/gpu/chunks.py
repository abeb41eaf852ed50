"""The part of `all_kernels` about chunked backprop: a chunk's attention over a buffer, and gradients.

Times are of the last 2,048 tokens of a sequence, by the kernels and by the XLA loops that chunked backprop has for
platforms without kernels. Gradients of keys and values are added to sums in float32; that these are not donated here,
and so copied once, is in both sides' times.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from benchmarks.kernels.gpu.flash import PATTERNS, pairs, shortened
from benchmarks.kernels.gpu.parts import Device, Line, copies, exact, worst
from benchmarks.model_shapes import SHAPES
from pallas_kernels import api, reference
from pallas_kernels.patterns import Pattern
from streamjax.attention import blockwise

_PATTERNS = {"chunk": PATTERNS["causal"], "chunk-sinks": PATTERNS["sinks"]}
NAMES = tuple(_PATTERNS)
KERNELS = ("triton",)
CHUNK = 2048
ROW, ROWS = 1, 2  # of the buffer


def inputs(model: str, length: int, seed: int, dtype: Any = jnp.bfloat16, chunk: int = CHUNK) -> list[jax.Array]:
    """Queries, buffers of keys and values, the output's cotangent, and sums of the buffers' gradients."""
    config, keys = SHAPES[model], jax.random.split(jax.random.key(seed), 6)
    query = 1, chunk, config.num_heads, config.head_dim
    buffer = ROWS, 1, config.num_kv_heads, length, config.head_dim
    shapes = [(query, dtype), (buffer, dtype), (buffer, dtype), *[(x, jnp.float32) for x in (query, buffer, buffer)]]
    return [jax.random.normal(key, *shape) for key, shape in zip(keys, shapes, strict=True)]


def forward(
    pattern: Pattern, offset: int, q: jax.Array, k: jax.Array, v: jax.Array, *_: jax.Array, interpret: bool = False
) -> Any:
    where = {"offset": offset, "row": ROW, "interpret": interpret}
    return api.chunk_attention(q, k, v, pattern, implementation="triton", **where)


def both(pattern: Pattern, offset: int, *arrays: jax.Array, interpret: bool = False) -> Any:
    """Output, gradient of the queries, and the sums with the chunk's part."""
    part = forward(pattern, offset, *arrays, interpret=interpret)
    where = {"offset": offset, "row": ROW, "interpret": interpret}
    q, k, v, *more = arrays
    return part.out, *api.chunk_gradients(q, k, v, pattern, part, *more, implementation="triton", **where)


def _loops(pattern: Pattern, offset: int, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    """What the loops take: `Blocks`, `Queries`, `Keys`."""
    block_q, block_k = blockwise.block_sizes()
    blocks = blockwise.Blocks(pattern, float(q.shape[-1]) ** -0.5, None, block_q, block_k)
    queries = blockwise.Queries(_grouped(q, k.shape[2]), None, None, offset)
    return blocks, queries, blockwise.Keys(k, v, None, ROW, 0, offset + q.shape[1])


def _grouped(x: jax.Array, heads: int) -> jax.Array:
    return rearrange(x, "b c (k g) d -> b k g c d", k=heads)


def forward_by_loops(pattern: Pattern, offset: int, *arrays: jax.Array) -> Any:
    return blockwise.forward(*_loops(pattern, offset, *arrays[:3]))


def both_by_loops(pattern: Pattern, offset: int, *arrays: jax.Array) -> Any:
    loops = _loops(pattern, offset, *arrays[:3])
    out, lse = blockwise.forward(*loops)
    d_out = _grouped(arrays[3], arrays[1].shape[2])
    return out, *blockwise.backward(*loops, lse, d_out, -jnp.sum(d_out * out, axis=-1), *arrays[4:])


def errors(
    model: str,
    name: str,
    kernel: str = "triton",
    dtype: Any = jnp.bfloat16,
    length: int = 1536,
    interpret: bool = False,
) -> float:
    """Largest relative error of output, queries' gradient and sums, of a chunk with other keys before and behind it."""
    chunk, offset, pattern = length // 4, length // 2, shortened(_PATTERNS[name], length)
    arrays = inputs(model, length, 0, dtype, chunk)
    mine = jax.jit(partial(both, pattern, offset, interpret=interpret))(*arrays)
    with jax.enable_x64(True):
        scale = float(SHAPES[model].head_dim) ** -0.5

        def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            heads_inside = (jnp.swapaxes(x[ROW], 1, 2) for x in (k, v))
            return reference.flash_attention(q, *heads_inside, pattern, scale=scale, offset=offset).out

        @jax.jit
        def right(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array, *sums: jax.Array) -> Any:
            out, pull = jax.vjp(plain, q, k, v)
            d_q, *grads = pull(d_out)
            return out, d_q, *(total + grad for total, grad in zip(sums, grads, strict=True))

        return worst(mine, right(*exact(arrays)))


def measure(model: str, name: str, length: int, kernels: Sequence[str], device: Device) -> list[Line]:
    """A line for each side and direction, of the last chunk of `length` tokens."""
    pattern, config, offset, lines = _PATTERNS[name], SHAPES[model], length - CHUNK, []
    work = 4 * pairs(pattern, length, offset) * config.num_heads * config.head_dim
    sets = copies(partial(inputs, model, length))
    for direction, factor in (("forward", 1.0), ("both", 3.5)):
        run, loops = (forward, forward_by_loops) if direction == "forward" else (both, both_by_loops)
        programs = {"streamjax": partial(run, pattern, offset), "xla loops": partial(loops, pattern, offset)}
        labels = {"model": model, "pattern": name, "tokens": length, "direction": direction}
        lines += device.lines(programs, sets, "TFLOP/s", factor * work, **labels)
    return lines
