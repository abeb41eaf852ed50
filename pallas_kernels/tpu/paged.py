"""Decoding over chosen pages on TPUs: a few queries against the pages of a long cache that each key head names.

Which pages is data: their numbers are prefetched as scalars, and the next pages are fetched while these are worked on.
A page is small (64 tokens of 128 channels are 16 KB), so several are fetched for one step, each by a block of its own,
and worked on as one.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import Partial
from pallas_kernels.tpu import online
from pallas_kernels.tpu.tiles import LANES

TOGETHER = 512  # slots that are worked on at once


@dataclasses.dataclass(frozen=True)
class _Static:
    """scale, softcap: of the logits. slots: of the ring. size: of a page. together: pages of a step. steps: of a head.
    key_heads: of a row."""

    scale: float
    softcap: float | None
    slots: int
    size: int
    together: int
    steps: int
    key_heads: int

    def page(self, pages: Any, b: Any, h: Any, n: Any, i: int) -> Any:
        """Number of the i-th page of a step; -1 for none."""
        return pages[b * self.key_heads + h, n * self.together + i]


def paged_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    pages: Int32[Array, "B K N"],
    count: Int32[Array, " B"],
    *,
    page_size: int,
    scale: float,
    first: Int32[Array, " B"] | None = None,
    softcap: float | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> Partial:
    """`pallas_kernels.api.paged_attention` on a TPU; see there for the arguments. block: slots of one step."""
    key_heads, slots = k.shape[1], k.shape[2]
    together = max(1, min((block or TOGETHER) // page_size, pages.shape[2]))
    steps = -(-pages.shape[2] // together)
    static = _Static(scale, softcap, slots, page_size, together, steps, key_heads)
    table = jnp.pad(pages, [(0, 0), (0, 0), (0, steps * together - pages.shape[2])], constant_values=-1)
    table = table.reshape(-1, steps * together).astype(jnp.int32)
    held = jnp.stack([count, jnp.zeros_like(count) if first is None else first]).astype(jnp.int32)
    grouped = online.grouped(q, key_heads)
    batch, _, rows, width = grouped.shape

    def page(i: int) -> Any:
        def at(b: Any, h: Any, n: Any, held: Any, pages: Any) -> Any:
            # In the place of none the head's first page: what lies anywhere else might not be numbers.
            wanted, spare = static.page(pages, b, h, n, i), jnp.maximum(static.page(pages, b, h, 0, 0), 0)
            return b, h, jnp.where(wanted < 0, spare, wanted), 0

        return pl.BlockSpec((None, None, page_size, width), at)

    def whole(columns: int) -> Any:
        return pl.BlockSpec((None, None, rows, columns), lambda b, h, n, held, pages: (b, h, 0, 0))

    out, lse = pl.pallas_call(
        partial(_kernel, static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, key_heads, steps),
            in_specs=[whole(width), *(page(i) for _ in "kv" for i in range(together))],
            out_specs=[whole(width), whole(LANES)],
            scratch_shapes=online.scratch(rows, width),
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, key_heads, rows, columns), jnp.float32) for columns in (width, LANES)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="paged_attention",
    )(held, table, grouped, *[k] * together, *[v] * together)
    return online.ungrouped(out, lse, q)


def _kernel(static: _Static, held_ref: Any, pages_ref: Any, q_ref: Any, *refs: Any) -> None:
    keys, values, (out, lse, *state) = refs[: static.together], refs[static.together : -5], refs[-5:]
    b, h, n = (pl.program_id(axis) for axis in range(3))
    pl.when(n == 0)(partial(online.start, state))
    pages = [static.page(pages_ref, b, h, n, i) for i in range(static.together)]

    @pl.when(pages[0] >= 0)
    def _() -> None:
        k, v = (jnp.concatenate([ref[...] for ref in refs]) for refs in (keys, values))
        block = {"q": q_ref[...], "k": k, "v": v}
        column = lax.broadcasted_iota(jnp.int32, (block["q"].shape[0], static.together * static.size), 1)
        index = jnp.full_like(column, -1)
        for i, page in enumerate(pages):
            here = column - i * static.size
            index = jnp.where((here >= 0) & (here < static.size) & (page >= 0), page * static.size + here, index)
        seen = (index >= 0) & (online.age(index, held_ref[1, b], static.slots) < held_ref[0, b])
        online.add(static.scale, static.softcap, block, seen, state)

    pl.when(n == static.steps - 1)(partial(online.finish, static.scale, static.softcap, state, out, lse))
