"""Scores of pages on TPUs: queries against what is kept of each page, blocks of pages one after another."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.tpu.tiles import LANES, NT, SUBLANES, dot

BLOCK = 512  # pages


def page_scores(
    q: Float[Array, "B K N W"],
    summary: Float[Array, "B K P partsW"],
    some: Bool[Array, "B K P parts"] | None,
    *,
    block: int | None = None,
    interpret: Any = False,
) -> Float[Array, "B K N P"]:
    """`pallas_kernels.api.page_scores` on a TPU, of queries by key head. block: pages a step, a multiple of 128."""
    batch, heads, count, width = q.shape
    pages, parts = summary.shape[2], summary.shape[3] // width
    rows = -(-count // (2 * SUBLANES)) * 2 * SUBLANES
    q = jnp.pad(q, [(0, 0), (0, 0), (0, rows - count), (0, 0)])
    block = min(block or BLOCK, pages if pages < LANES else pages // LANES * LANES)
    operands, specs = (
        [q, summary],
        [
            pl.BlockSpec((None, None, rows, width), lambda b, h, n: (b, h, 0, 0)),
            pl.BlockSpec((None, None, block, parts * width), lambda b, h, n: (b, h, n, 0)),
        ],
    )
    if some is not None:  # pages along lanes, as the scores lie
        operands.append(jnp.swapaxes(some, 2, 3).astype(jnp.int32))
        specs.append(pl.BlockSpec((None, None, parts, block), lambda b, h, n: (b, h, 0, n)))
    found = pl.pallas_call(
        partial(_kernel, parts),
        grid=(batch, heads, -(-pages // block)),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, None, rows, block), lambda b, h, n: (b, h, 0, n)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, rows, pages), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        interpret=interpret,
        name="page_scores",
    )(*operands)
    return found[:, :, :count]


def _kernel(parts: int, q: Any, summary: Any, *refs: Any) -> None:
    *some, out = refs
    width = q.shape[1]
    best = None
    for part in range(parts):
        found = dot(q[...], summary[:, part * width : (part + 1) * width], NT)
        if some:
            found = jnp.where(some[0][part : part + 1] > 0, found, -jnp.inf)
        best = found if best is None else jnp.maximum(best, found)
    out[...] = best
