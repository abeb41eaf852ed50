"""A few rows times a matrix of four-bit codes on GPUs, in Triton: the codes are read once, and widened in registers.

XLA for GPUs writes such a matrix out in sixteen bits first, four times what its codes take. Here a program takes a
block of outputs and a share of the inputs, so that a small matrix fills the GPU too; the shares are added outside.
Two codes of a group share a byte: lower halves meet the group's first inputs, upper halves the others, each half with a
product of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.gpu.flash_operands import dot
from pallas_kernels.gpu.slot_attention import PROGRAMS

ROWS = 16  # of a product
OUTPUTS, BYTES = 64, 64  # of a block of codes
STEPS = 4  # blocks of codes for which a program of their own is worth it


def grouped_product(
    x: Float[Array, "R n"],
    codes: UInt8[Array, "..."],
    offsets: Int8[Array, "..."],
    scales: Float[Array, "..."],
    *,
    outputs_first: bool = False,
    splits: int | None = None,
    interpret: bool = False,
) -> Float[Array, "R m"]:
    """`x` times the matrix [n, m] of `(code - 8 + offset / 16) * scale`, in float32.

    Args:
      x: up to 16 rows.
      codes: [n / 2, m], two in a byte: see `streamjax.models.quantisation`.
      offsets: [n / group, m].
      scales: [n / group, m].
      outputs_first: codes, offsets and scales are transposed, [m, ...].
      splits: shares of the inputs; as many as fill the GPU where None.
      interpret: run it in an interpreter.

    Raises:
      ValueError: more rows, or groups that are no power of two.
    """
    if len(x) > ROWS:
        raise ValueError(f"{len(x)} rows: the kernel takes {ROWS}")
    along, across = (1, 0) if outputs_first else (0, 1)
    count, outputs = codes.shape[along], codes.shape[across]
    half = count // scales.shape[along]
    if half * scales.shape[along] != count or half & (half - 1) or half > BYTES:
        raise ValueError(f"{count} bytes for {scales.shape[along]} groups: a group has a power of two up to {BYTES}")
    halves = rearrange(x, "r (g two h) -> two r (g h)", two=2, h=half)
    blocks = pl.cdiv(outputs, OUTPUTS)
    steps = pl.cdiv(count, BYTES)
    if splits is None:
        splits = max(min(PROGRAMS // blocks, steps // STEPS), 1)

    def whole(x: Array) -> Any:
        return pl.BlockSpec(x.shape, lambda i, s: (0,) * x.ndim)

    operands = (halves, codes, offsets, scales)
    shares: Array = pl.pallas_call(
        partial(_kernel, half, pl.cdiv(steps, splits), outputs_first),
        grid=(blocks, splits),
        in_specs=[whole(x) for x in operands],
        out_specs=pl.BlockSpec((None, len(x), outputs), lambda i, s: (s, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((splits, len(x), outputs), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="grouped_product",
    )(*operands)
    return jnp.sum(shares, axis=0)


def _kernel(
    half: int, steps: int, outputs_first: bool, x: Any, codes: Any, offsets: Any, scales: Any, out: Any
) -> None:
    along, across = (1, 0) if outputs_first else (0, 1)
    count, groups = codes.shape[along], BYTES // half
    share = pl.program_id(1) * steps
    row, column = jnp.arange(ROWS), pl.program_id(0) * OUTPUTS + jnp.arange(OUTPUTS)
    here, inside = row < x.shape[1], column < codes.shape[across]

    def tile(source: Any, first: Array, size: int) -> Array:
        """Some places along the inputs, of the block's outputs."""
        place = first + jnp.arange(size)
        known = place < source.shape[along]
        if outputs_first:
            return plgpu.load(source.at[column[:, None], place[None]], mask=inside[:, None] & known[None], other=0)
        return plgpu.load(source.at[place[:, None], column[None]], mask=known[:, None] & inside[None], other=0)

    def spread(parts: Array) -> Array:
        """One number a group, at each of its places."""
        shape = (OUTPUTS, groups, half) if outputs_first else (groups, half, OUTPUTS)
        flat = (OUTPUTS, BYTES) if outputs_first else (BYTES, OUTPUTS)
        return jnp.broadcast_to(jnp.expand_dims(parts, along + 1), shape).reshape(flat)

    def step(i: Array, total: Array) -> Array:
        first = (share + i) * BYTES
        pairs = tile(codes, first, BYTES).astype(jnp.int32)
        scale = spread(tile(scales, first // half, groups).astype(jnp.float32))
        shift = spread(tile(offsets, first // half, groups).astype(jnp.float32)) / 16 - 8
        place = first + jnp.arange(BYTES)
        for which, nibbles in enumerate((pairs & 15, pairs >> 4)):
            weight = ((nibbles.astype(jnp.float32) + shift) * scale).astype(x.dtype)
            known = here[:, None] & (place < count)[None]
            part = plgpu.load(x.at[which, row[:, None], place[None]], mask=known, other=0.0)
            total += dot(part, weight.T if outputs_first else weight)
        return total

    total = lax.fori_loop(0, steps, step, jnp.zeros((ROWS, OUTPUTS), jnp.float32))
    plgpu.store(out.at[row[:, None], column[None]], total, mask=here[:, None] & inside[None])
