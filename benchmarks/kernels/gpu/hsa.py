"""The part of `all_kernels` about hierarchical sparse attention: how right the kernel is, and how fast.

A sequence is its own memory, as in training: every token reads the best 8 of the chunks of 64 tokens before it. Times
are of all of it, the choice of chunks by their landmarks included: by the kernel, and by both forms that XLA has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.gpu.parts import Device, Line, copies, exact, worst
from benchmarks.model_shapes import SHAPES
from pallas_kernels import api, reference
from streamjax.attention.landmarks.page_attention import LandmarkPages
from streamjax.attention.landmarks.page_choice import VisiblePages

NAMES = ("hsa",)
KERNELS = ("triton",)
SIZE, CHOICES = 64, 8
FORMS = {"streamjax": "pallas", "gathered": "gathered", "dense": "dense"}
DENSE_TOKENS = 8192  # from here on the dense form takes seconds


def inputs(model: str, length: int, seed: int, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """Queries, queries of the landmarks, the sequence's chunks, and the output's cotangent."""
    config = SHAPES[model]
    keys, heads, width = jax.random.split(jax.random.key(seed), 6), config.num_kv_heads, config.head_dim
    chunks = 1, heads, length // SIZE, SIZE, width
    memory = LandmarkPages(*(jax.random.normal(key, chunks, dtype) for key in keys[:2]), jax.random.normal(
        keys[2], (*chunks[:3], width), dtype))  # fmt: skip
    q, d_out = (jax.random.normal(key, (1, length, config.num_heads, width), dtype) for key in keys[3:5])
    return q, jax.random.normal(keys[5], (1, length, heads, width), dtype), memory, d_out.astype(jnp.float32)


def read(form: Any, q: jax.Array, retrieval: jax.Array, chunks: LandmarkPages) -> jax.Array:
    number = jnp.arange(chunks.k.shape[2], dtype=jnp.int32)[None]
    visible = VisiblePages(number, jnp.arange(q.shape[1], dtype=jnp.int32)[None] // SIZE)
    return chunks.read(q, retrieval, visible, CHOICES, q.shape[-1] ** -0.5, form, 0)


def both(form: Any, q: jax.Array, retrieval: jax.Array, chunks: LandmarkPages, d_out: jax.Array) -> Any:
    """Output and gradients."""
    out, pull = jax.vjp(partial(read, form), q, retrieval, chunks)
    return out, pull(d_out)


def errors(
    model: str, name: str, kernel: str = "triton", dtype: Any = jnp.bfloat16, length: int = 64 * 20,
    interpret: bool = False,
) -> float:  # fmt: skip
    """Largest relative error of the kernel's output and gradients against float64."""
    q, _, chunks, d_out = inputs(model, length, 0, dtype)
    random, shape = np.random.default_rng(0), (1, chunks.k.shape[1], length, min(CHOICES, chunks.k.shape[2]))
    order = np.argsort(random.random((*shape[:3], chunks.k.shape[2])), axis=-1)[..., : shape[-1]]
    chosen = jnp.asarray(np.where(random.random(shape) < 0.2, -1, order), jnp.int32)
    operands = q, chunks.k, chunks.v, jnp.asarray(random.random(shape), jnp.float32)

    ours = partial(api.hsa_attention, implementation="triton", interpret=interpret)
    mine = jax.jit(partial(_gradients, ours, chosen))(operands, d_out)
    with jax.enable_x64(True):
        return worst(mine, jax.jit(partial(_gradients, reference.hsa_attention, chosen))(*exact((operands, d_out))))


def _gradients(attention: Callable[..., jax.Array], chosen: jax.Array, arrays: Any, d_out: jax.Array) -> Any:
    """Output and gradients of q, k, v and the weights."""
    scale = float(arrays[0].shape[-1]) ** -0.5
    out, pull = jax.vjp(lambda q, k, v, weights: attention(q, k, v, chosen, weights, scale=scale), *arrays)
    return out, pull(d_out)


def measure(model: str, name: str, length: int, kernels: Sequence[str], device: Device) -> list[Line]:
    """A line for each form and direction."""
    config, lines = SHAPES[model], []
    sets = copies(partial(inputs, model, length))
    pairs = sum(min(t // SIZE, CHOICES) for t in range(length))
    work = 4 * pairs * SIZE * config.num_heads * config.head_dim  # two products forwards, five backwards
    forms = {side: form for side, form in FORMS.items() if form != "dense" or length <= DENSE_TOKENS}
    for direction, factor in (("forward", 1.0), ("both", 3.5)):
        run: Callable[..., Any] = read if direction == "forward" else both
        arrays = [x[:3] if direction == "forward" else x for x in sets]
        labels = {"model": model, "pattern": name, "tokens": length, "direction": direction}
        programs = {side: partial(run, form) for side, form in forms.items()}
        lines += device.lines(programs, arrays, "TFLOP/s", factor * work, **labels)
    return lines
