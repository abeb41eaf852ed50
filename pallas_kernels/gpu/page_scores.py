"""Scores of pages on GPUs, in Triton: queries against what is kept of each page, a block of pages a program."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.gpu.flash_operands import dot
from pallas_kernels.gpu.slot_attention import LEAST

BLOCK, ROWS = 64, 64  # pages and queries of a program
MAX_WIDTH = 512  # of a summary's part: bounds of heads of 256


def page_scores(
    q: Float[Array, "B K N W"],
    summary: Float[Array, "B K P partsW"],
    some: Bool[Array, "B K P parts"] | None,
    *,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B K N P"]:
    """`pallas_kernels.api.page_scores` on a GPU, of queries by key head. block: pages of a program, a power of two.

    Raises:
      ValueError: heads wider than the kernel takes, or blocks of another size.
    """
    batch, heads, count, width = q.shape
    pages, parts = summary.shape[2], summary.shape[3] // width
    if width > MAX_WIDTH:
        raise ValueError(f"{width} numbers of a page: the Triton kernel takes {MAX_WIDTH} at most; use the XLA path")
    block = block or (BLOCK if width <= 256 else BLOCK // 2)
    if block < LEAST or block & (block - 1):
        raise ValueError(f"blocks of {block} pages: use a power of two from {LEAST}")
    rows = min(max(pl.next_power_of_2(count), LEAST), ROWS)
    operands = [q, summary] if some is None else [q, summary, some.astype(jnp.int8)]

    def whole(x: Array) -> Any:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, i, n: (b, h, 0, 0))

    found: Array = pl.pallas_call(
        partial(_kernel, rows, block, width, parts),
        grid=(batch, heads, pl.cdiv(count, rows), pl.cdiv(pages, block)),
        in_specs=[whole(x) for x in operands],
        out_specs=pl.BlockSpec((None, None, count, pages), lambda b, h, i, n: (b, h, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, count, pages), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="page_scores",
    )(*operands)
    return found


def _kernel(rows: int, block: int, width: int, parts: int, q: Any, summary: Any, *refs: Any) -> None:
    *some, out = refs
    first, page = pl.program_id(2) * rows, pl.program_id(3) * block
    row, column = first + jnp.arange(rows), page + jnp.arange(block)
    here, there = row < q.shape[0], column < summary.shape[0]
    channels = jnp.arange(max(pl.next_power_of_2(width), LEAST))
    inside = (channels < width)[None]
    queries = plgpu.load(q.at[row[:, None], channels[None]], mask=here[:, None] & inside, other=0.0)
    best = jnp.full((rows, block), -jnp.inf, jnp.float32)
    for part in range(parts):
        at = summary.at[column[:, None], part * width + channels[None]]
        found = dot(queries, plgpu.load(at, mask=there[:, None] & inside, other=0.0).T)
        if some:
            held = plgpu.load(some[0].at[column, jnp.full_like(column, part)], mask=there, other=0)
            found = jnp.where((held > 0)[None], found, -jnp.inf)
        best = jnp.maximum(best, found)
    plgpu.store(out.at[row[:, None], column[None]], best, mask=here[:, None] & there[None])
