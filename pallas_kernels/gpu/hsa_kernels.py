"""Attention inside chosen pages on GPUs, in Triton: kernels over tiles of pairs of a query and a page.

A program takes one tile: it gathers the rows of the tile's queries, all query heads of a key head, and has one page's
keys and values. What it makes for a pair goes to a place of the pair's own and is summed over a query's choices
afterwards: no two programs write to one place, and a sum does not depend on their order. For the gradients of keys and
values a program takes one page and walks its tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.choice_tiles import Tiles
from pallas_kernels.gpu.exponentials import MASKED, exp2
from pallas_kernels.gpu.flash_operands import dot
from pallas_kernels.tile_logits import LOG2E

LEAST = 16  # the smallest side of a product
Reads = Mapping[str, Any]
READS = ("pair", "first", "page", "weights", "q", "d_out", "k", "v")


@dataclasses.dataclass(frozen=True)
class Shape:
    """heads, group: query heads of a row and of a key head. queries, choices: of a row; of a query. pages of `slots`
    tokens. width: channels. block: pairs of a tile. interpreted: whether an interpreter runs it."""

    scale: float
    heads: int
    group: int
    queries: int
    choices: int
    pages: int
    slots: int
    width: int
    block: int
    interpreted: bool

    @property
    def members(self) -> int:
        """Rows of a pair: a power of two."""
        return pl.next_power_of_2(self.group)

    @property
    def rows(self) -> int:
        return self.block * self.members

    @property
    def padded(self) -> tuple[int, int]:
        """Slots and channels of a block."""
        return max(pl.next_power_of_2(self.slots), LEAST), max(pl.next_power_of_2(self.width), LEAST)


def hsa_operands(shape: Shape, tiles: Tiles, **arrays: jax.Array) -> dict[str, jax.Array]:
    """By name: pair, first, page; weights [B, K, N C]; q, d_out [B, C H, D]; k, v [B, K, P S, D]."""
    batch, key_heads = tiles.total.shape
    flat = {
        "weights": (batch, key_heads, -1),
        "q": (batch, -1, shape.width),
        "d_out": (batch, -1, shape.width),
        "k": (batch, key_heads, -1, shape.width),
        "v": (batch, key_heads, -1, shape.width),
    }
    found = {name: x.reshape(flat[name]) for name, x in arrays.items()}
    return found | {"pair": tiles.pair.reshape(batch, key_heads, -1), "first": tiles.first, "page": tiles.page}


def forward(shape: Shape, arrays: Mapping[str, jax.Array]) -> jax.Array:
    """Weighted output of each pair, of q's dtype: [B, N, C, H, D]; what is written where a query chose none is open."""
    tiles, dtype = arrays["page"].shape[2], arrays["q"].dtype
    (out,) = _run_kernel(_forward_kernel, shape, arrays, tiles, {"rows": dtype}, "hsa_forward")
    return out.reshape(-1, shape.choices, shape.queries, shape.heads, shape.width)


def _forward_kernel(shape: Shape, read: Reads, out: Any) -> None:
    tile, head = pl.program_id(0), pl.program_id(1)  # inside a branch the interpreter does not know them

    @pl.when(tile < read["first"][shape.pages])
    def _() -> None:
        rows = _Rows(shape, read, head, tile)
        k, v = (_page(shape, read[name], read["page"][tile]) for name in "kv")
        weights = _softmax(shape, dot(rows.load("q"), k.T), axis=1)
        found = dot((weights * rows.weight[:, None]).astype(v.dtype), v)
        rows.store(out, found)


def query_gradients(shape: Shape, arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Gradients of each pair: of q, [B, N, C, H, D] of its dtype, and of the weight by head, float32 [B, N, C, H]."""
    tiles, outputs = arrays["page"].shape[2], {"rows": arrays["q"].dtype, "line": jnp.float32}
    d_q, d_weights = _run_kernel(_query_kernel, shape, arrays, tiles, outputs, "hsa_query_gradients")
    leading = (-1, shape.choices, shape.queries, shape.heads)
    return d_q.reshape(*leading, shape.width), d_weights.reshape(leading)


def _query_kernel(shape: Shape, read: Reads, d_q: Any, d_weight: Any) -> None:
    tile, head = pl.program_id(0), pl.program_id(1)

    @pl.when(tile < read["first"][shape.pages])
    def _() -> None:
        rows = _Rows(shape, read, head, tile)
        k, v = (_page(shape, read[name], read["page"][tile]) for name in "kv")
        weights = _softmax(shape, dot(rows.load("q"), k.T), axis=1)
        d_weights = dot(rows.load("d_out"), v.T)
        along = jnp.sum(weights * d_weights, axis=1)
        plgpu.store(d_weight.at[rows.place], along, mask=rows.some)
        d_scores = weights * (d_weights - along[:, None]) * (rows.weight * shape.scale)[:, None]
        rows.store(d_q, dot(d_scores.astype(k.dtype), k))


def key_gradients(shape: Shape, arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Float32 gradients of k and v, [B, K, P, S, D]; 0 for pages that nobody chose."""
    outputs = {"d_k": jnp.float32, "d_v": jnp.float32}
    d_k, d_v = _run_kernel(_key_kernel, shape, arrays, shape.pages, outputs, "hsa_key_gradients")
    each = (*d_k.shape[:2], shape.pages, shape.slots, shape.width)
    return d_k.reshape(each), d_v.reshape(each)


def _key_kernel(shape: Shape, read: Reads, d_k: Any, d_v: Any) -> None:
    page, head = pl.program_id(0), pl.program_id(1)
    k, v = (_page(shape, read[name], page) for name in "kv")

    def add(tile: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows = _Rows(shape, read, head, tile)
        q, d_out = rows.load("q"), rows.load("d_out")
        weights = _softmax(shape, dot(k, q.T), axis=0)
        d_weights = dot(v, d_out.T)
        along = jnp.sum(weights * d_weights, axis=0)
        d_scores = weights * (d_weights - along[None]) * rows.weight[None]
        return (
            sums[0] + dot(d_scores.astype(q.dtype), q),
            sums[1] + dot((weights * rows.weight[None]).astype(q.dtype), d_out),
        )

    zeros = jnp.zeros(shape.padded, jnp.float32)
    sums_k, sums_v = lax.fori_loop(read["first"][page], read["first"][page + 1], add, (zeros, zeros))
    for ref, value in ((d_k, sums_k * shape.scale), (d_v, sums_v)):
        at, mask = _slots(shape, page)
        plgpu.store(ref.at[at], value, mask=mask)


class _Rows:
    """The rows of a tile: query heads of a pair one after another, `members` for each."""

    def __init__(self, shape: Shape, read: Reads, key_head: Any, tile: Any):
        row, members = jnp.arange(shape.rows, dtype=jnp.int32), jnp.int32(shape.members)
        pair = plgpu.load(read["pair"].at[tile * shape.block + lax.div(row, members)])
        member = lax.rem(row, members)
        self.shape, self.read = shape, read
        self.some = (pair >= 0) & (member < shape.group)
        pair = jnp.maximum(pair, 0)
        head = key_head * shape.group + jnp.minimum(member, shape.group - 1)
        # Rows that are none lie behind all others: the interpreter writes what was there, masked or not.
        self.place = jnp.where(self.some, pair * shape.heads + head, shape.queries * shape.choices * shape.heads)
        self.query = lax.rem(pair, jnp.int32(shape.queries)) * shape.heads + head
        self.weight = plgpu.load(read["weights"].at[pair], mask=self.some, other=0.0)

    @property
    def mask(self) -> jax.Array:
        return self.some[:, None] & (jnp.arange(self.shape.padded[1]) < self.shape.width)[None]

    def _indices(self, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        return row[:, None], jnp.arange(self.shape.padded[1])[None]

    def load(self, name: str) -> jax.Array:
        return plgpu.load(self.read[name].at[self._indices(self.query)], mask=self.mask, other=0.0)

    def store(self, ref: Any, value: jax.Array) -> None:
        plgpu.store(ref.at[self._indices(self.place)], value.astype(ref.dtype), mask=self.mask)


def _slots(shape: Shape, page: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Where the slots of a page are, and which of a block's rows and channels there are."""
    slots, width = shape.padded
    seen = (jnp.arange(slots) < shape.slots)[:, None] & (jnp.arange(width) < shape.width)[None]
    return (page * shape.slots + jnp.arange(slots)[:, None], jnp.arange(width)[None]), seen


def _page(shape: Shape, ref: Any, page: Any) -> jax.Array:
    at, mask = _slots(shape, page)
    return plgpu.load(ref.at[at], mask=mask, other=0.0)


def _softmax(shape: Shape, dots: jax.Array, axis: int) -> jax.Array:
    """Along the slots, which lie along `axis`."""
    if shape.padded[0] != shape.slots:
        dots = jnp.where(lax.broadcasted_iota(jnp.int32, dots.shape, axis) < shape.slots, dots, MASKED)
    factor = shape.scale * LOG2E
    weights = exp2(dots, factor, jnp.max(dots, axis=axis, keepdims=True) * factor, shape.interpreted)
    return weights / jnp.sum(weights, axis=axis, keepdims=True)


def _run_kernel(
    kernel: Callable[..., None],
    shape: Shape,
    arrays: Mapping[str, jax.Array],
    programs: int,
    outputs: Mapping[str, Any],
    name: str,
) -> Any:
    """`kernel` for a grid (tile or page, key head, row), whose programs see all of their key head or of their row.

    outputs: dtypes of "rows" and "line", with something for each pair and query head, and of "d_k" and "d_v".
    """
    names = [name for name in READS if name in arrays]
    batch, key_heads, *_ = arrays["k"].shape
    pairs = shape.queries * shape.choices * shape.heads
    shapes = {name: x.shape for name, x in arrays.items()} | {
        "rows": (batch, pairs, shape.width),
        "line": (batch, pairs),
        "d_k": arrays["k"].shape,
        "d_v": arrays["k"].shape,
    }

    def spec(name: str) -> Any:
        form, by_head = shapes[name], name not in ("q", "d_out", "rows", "line")
        if name not in ("pair", "first", "page", "weights", "line"):
            form = (*form[:-1], shape.padded[1])
        if by_head:
            return pl.BlockSpec((None, None, *form[2:]), lambda i, h, b: (b, h, *[0] * (len(form) - 2)))
        return pl.BlockSpec((None, *form[1:]), lambda i, h, b: (b, *[0] * (len(form) - 1)))

    def run(*refs: Any) -> None:
        kernel(shape, dict(zip(names, refs, strict=False)), *refs[len(names) :])

    return pl.pallas_call(
        run,
        grid=(programs, key_heads, batch),
        in_specs=[spec(name) for name in names],
        out_specs=[spec(name) for name in outputs],
        out_shape=[jax.ShapeDtypeStruct(shapes[name], dtype) for name, dtype in outputs.items()],
        compiler_params=plgpu.CompilerParams(num_warps=4 if shape.width <= 64 else 8, num_stages=2),
        interpret=shape.interpreted,
        name=name,
    )(*(arrays[name] for name in names))
