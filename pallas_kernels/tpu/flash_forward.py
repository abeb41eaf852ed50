"""FlashAttention forwards for TPUs: output and log-sum-exp, of causal patterns with a window and sinks.

One block of queries stays in the chip's memory with its running maximum, sum and output (FlashAttention-2, 2307.08691)
while blocks of keys pass. Three things make a step cheap:
- The grid has the steps that the pattern needs and no other (`schedule.py`), and tiles that the pattern does not cut
  are not masked: there are two versions of a tile's code.
- Sinks are an operand of their own, there for all steps, which the first step of a block reads: they do not cost a
  block of keys.
- The sum of the weights is taken lane by lane; the lanes are added once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_ranges import Ranges
from pallas_kernels.tile_logits import LOG2E, MASKED, Settings, logits, sink_visible, tile_mask
from pallas_kernels.tpu.flash_operands import Operands, query_outer, scalars
from pallas_kernels.tpu.schedule import Grid, Step
from pallas_kernels.tpu.tiles import LANES, NN, NT, across, dot, pieces, when_runs

READS = ("q", "k", "v", "sink_k", "sink_v", "slopes", "query_rows", "key_columns", "sink_columns")
VMEM_BYTES = 64 * 2**20


def forward(
    settings: Settings, ranges: Ranges, operands: Operands, offset: Any, interpret: Any = False, row: Any = 0
) -> tuple[jax.Array, jax.Array]:
    """Output, float32 [B, H, T, D], and log-sum-exp, float32 [B, H, 1, T]; 0 and -inf where nothing is seen."""
    batch, heads, length, width = operands["q"].shape
    grid = Grid.make(ranges, offset)
    specs = query_outer(grid, operands, settings.group)
    names = [name for name in READS if name in operands]
    state = pltpu.VMEM((ranges.block_q, LANES), jnp.float32)
    call = pl.pallas_call(
        partial(_kernel, settings, grid, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, grid.rows, grid.width),
            in_specs=[specs[name] for name in names],
            out_specs=[specs["out"], specs["lse"]],
            scratch_shapes=[state, state, pltpu.VMEM((ranges.block_q, width), jnp.float32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, length, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="flash_forward",
    )
    out, lse = call(scalars(offset, row), *(operands[name] for name in names))
    return out, lse


def _kernel(settings: Settings, grid: Grid, names: list[str], offset_ref: Any, *refs: Any) -> None:
    read = dict(zip(names, refs, strict=False))
    out, lse, top, total, sums = refs[len(names) :]
    offset, ranges = offset_ref[0], grid.ranges
    step = grid.step(pl.program_id(2), pl.program_id(3), offset)
    tile = _Tile(settings, ranges, read, step, offset, top, total, sums)

    late = step.first & (tile.query + ranges.block_q > settings.window) if settings.sinks and settings.window else False
    if settings.sinks:
        pl.when(late)(tile.sinks)

    @pl.when(step.first & jnp.logical_not(late))
    def _() -> None:
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    when_runs(settings, ranges, step.runs, step.outer, step.inner, offset, tile.keys)

    @pl.when(step.last)
    def _() -> None:
        whole = jnp.broadcast_to(jnp.sum(total[...], axis=1, keepdims=True), total.shape)
        some = top[...] > 0.5 * MASKED
        shrink = jnp.where(some, 1.0 / whole, 0.0)
        out[...] = sums[...] * across(shrink, sums.shape[1])
        found = top[...] * (settings.exact / LOG2E) + jnp.log(whole)
        lse[...] = jnp.transpose(jnp.where(some, found, -jnp.inf))[:1]


class _Tile:
    """The queries at hand, against their sinks or one block of keys."""

    def __init__(
        self,
        settings: Settings,
        ranges: Ranges,
        read: Mapping[str, Any],
        step: Step,
        offset: Any,
        top: Any,
        total: Any,
        sums: Any,
    ):
        self.settings, self.ranges, self.read, self.step = settings, ranges, read, step
        self.top, self.total, self.sums = top, total, sums
        self.query = offset + step.outer * ranges.block_q
        self.slope = read["slopes"][pl.program_id(1)] if settings.alibi else None

    def keys(self, masked: bool) -> None:
        """One block of keys, for some queries after others."""
        key = self.step.inner * self.ranges.block_k
        for at, query in pieces(self.ranges.block_q, self.query, masked):
            dots = dot(self.read["q"][at], self.read["k"][...], NT)
            scores, _ = logits(self.settings, dots, query, key, self.slope)
            if masked:
                seen = tile_mask(self.settings, scores.shape, query, key, self._ids("key_columns", at))
                scores = jnp.where(seen, scores, MASKED)
            self._add(at, scores, self.read["v"][...])

    def sinks(self) -> None:
        """The first step: there is no state yet."""
        for at, query in pieces(self.ranges.block_q, self.query):
            dots = dot(self.read["q"][at], self.read["sink_k"][...], NT)
            scores, _ = logits(self.settings, dots, query, 0, self.slope)
            seen = sink_visible(self.settings, scores.shape, query, 0, self._ids("sink_columns", at))
            scores = jnp.where(seen, scores, MASKED)
            now = jnp.broadcast_to(jnp.max(scores, axis=1, keepdims=True), self.top[at].shape)
            self.top[at] = now
            self._sum(at, scores, now, self.read["sink_v"][...], None)

    def _ids(self, keys: str, at: Any) -> tuple[jax.Array, jax.Array] | None:
        return (self.read["query_rows"][at][:, :1], self.read[keys][:1]) if self.settings.segmented else None

    def _add(self, at: Any, scores: jax.Array, v: jax.Array) -> None:
        """The online softmax of some queries."""
        before = self.top[at]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        self.top[at] = now
        self._sum(at, scores, now, v, jnp.exp2((before - now) * self.settings.exact))

    def _sum(self, at: Any, scores: jax.Array, top: jax.Array, v: jax.Array, shrink: jax.Array | None) -> None:
        """Weights and weighted values onto those before, which `shrink` (none before where that is None)."""
        weights = jnp.exp2((scores - across(top, scores.shape[1])) * self.settings.exact)
        total = sum(weights[:, i : i + LANES] for i in range(0, weights.shape[1], LANES))
        added = dot(weights.astype(v.dtype), v, NN)
        if shrink is not None:
            total += self.total[at] * shrink
            added += self.sums[at] * across(shrink, added.shape[1])
        self.total[at], self.sums[at] = total, added
