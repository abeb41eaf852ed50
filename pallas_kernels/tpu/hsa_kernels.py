"""Attention inside chosen pages on TPUs: the two kernels over tiles of pairs of a query and a page.

A tile is one product of the rows of some queries, all query heads of a key head together, and one page. Queries and
results of many tokens stay in the chip's memory while all tiles of a head pass, so that rows are gathered and summed
there, by scalar indices, and nothing exists once for each pair in main memory. A page's keys and values are fetched
once for all of its tiles. Logits are [slots, rows]: the softmax runs along sublanes, and weights lie along lanes.
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

from pallas_kernels.tile_logits import LOG2E
from pallas_kernels.tpu.tiles import NN, NT, TN, dot

TOGETHER = 8  # pairs that are gathered or summed by one turn of a loop
VMEM_BYTES = 64 * 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """What all tiles of a call need, by heads (of all rows of a batch) and tiles; `spans` apart.

    page: of each tile, flat; the same again for tiles that hold nothing. total: tiles that hold something.
    index: queries of each tile's pairs, `queries` for none, and behind them how many there are.
    weight: of each row of a tile, a pair's query heads one after another.
    """

    page: Int32[Array, "*spans heads_tiles"]
    total: Int32[Array, "*spans heads"]
    index: Int32[Array, "*spans heads tiles 1 block_and_1"]
    weight: Float[Array, "*spans heads tiles 1 rows"]

    @property
    def tiles(self) -> int:
        return self.index.shape[1]

    @property
    def block(self) -> int:
        """Pairs of a tile."""
        return self.index.shape[3] - 1

    def specs(self, slots: int, width: int) -> dict[str, Any]:
        """Blocks in a grid (head, tile); tiles that hold nothing fetch nothing."""
        tiles = self.tiles

        def tile(h: Any, t: Any, page: Any, total: Any) -> Any:
            return h, jnp.minimum(t, jnp.maximum(total[h] - 1, 0)), 0, 0

        return {
            "index": pl.BlockSpec((None, None, 1, self.block + 1), tile, memory_space=pltpu.SMEM),
            "weight": pl.BlockSpec((None, None, 1, self.weight.shape[3]), tile),
            "queries": pl.BlockSpec(memory_space=pl.ANY),
            "page": pl.BlockSpec((None, None, slots, width), lambda h, t, page, total: (h, page[h * tiles + t], 0, 0)),
        }


def forward(
    scale: float,
    work: Work,
    q: Float[Array, "heads queries_and_1 G D"],
    k: Float[Array, "heads P S D"],
    v: Float[Array, "heads P S D"],
    interpret: Any,
) -> Float[Array, "heads queries_and_1 G D"]:
    """Weighted sums of the outputs of all pairs; q is float32, the last of its queries is for pairs that are none."""
    specs, rows = work.specs(*k.shape[2:]), work.weight.shape[3]
    tile = pltpu.VMEM((rows, q.shape[3]), jnp.float32)
    found: Array = pl.pallas_call(
        partial(_forward_kernel, scale, work.tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(q.shape[0], work.tiles),
            in_specs=[specs[name] for name in ("index", "weight", "queries", "page", "page")],
            out_specs=specs["queries"],
            scratch_shapes=[pltpu.VMEM(q.shape[1:], jnp.float32)] * 2 + [tile] * 2,
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        compiler_params=_PARAMETERS,
        interpret=interpret,
        name="hsa_forward",
    )(work.page, work.total, work.index, work.weight, q, k, v)
    return found


def _forward_kernel(
    scale: float, tiles: int, page: Any, total: Any, index: Any, weight: Any, q_in: Any, k: Any, v: Any, out: Any,
    q: Any, sums: Any, rows: Any, added: Any,
) -> None:  # fmt: skip
    head, tile = pl.program_id(0), pl.program_id(1)

    @pl.when(tile == 0)
    def _() -> None:
        pltpu.sync_copy(q_in.at[head], q)
        _clear(sums)
        rows[...] = jnp.zeros_like(rows)

    @pl.when(tile < total[head])
    def _() -> None:
        _gather(index, (q,), (rows,))
        weights = _softmax(dot(k[...], rows[...].astype(k.dtype), NT), scale, weight[...])
        added[...] = dot(weights.astype(v.dtype), v[...], TN)
        _scatter(index, added, sums)

    pl.when(tile == tiles - 1)(lambda: pltpu.sync_copy(sums, out.at[head]))


def backward(
    scale: float,
    work: Work,
    q: Float[Array, "heads queries_and_1 G D"],
    d_out: Float[Array, "heads queries_and_1 G D"],
    k: Float[Array, "heads P S D"],
    v: Float[Array, "heads P S D"],
    d_k: Float[Array, "heads P S D"],
    d_v: Float[Array, "heads P S D"],
    interpret: Any,
) -> tuple[Array, Array, Array, Array]:
    """Float32 gradients of q, of each row's weight as `work.weight` is, of k and of v; the last two onto those given.

    Pages that nobody chose keep what they had.
    """
    specs, rows = work.specs(*k.shape[2:]), work.weight.shape[3]
    tile = pltpu.VMEM((rows, q.shape[3]), jnp.float32)
    reads = "index", "weight", "queries", "queries", "page", "page", "page", "page"
    d_q, d_weight, d_k, d_v = pl.pallas_call(
        partial(_backward_kernel, scale, work.tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(q.shape[0], work.tiles),
            in_specs=[specs[name] for name in reads],
            out_specs=[specs[name] for name in ("queries", "weight", "page", "page")],
            scratch_shapes=[pltpu.VMEM(q.shape[1:], jnp.float32)] * 3 + [tile] * 3,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, work.weight, k, v)],
        input_output_aliases={8: 2, 9: 3},
        compiler_params=_PARAMETERS,
        interpret=interpret,
        name="hsa_backward",
    )(work.page, work.total, work.index, work.weight, q, d_out, k, v, d_k, d_v)
    return d_q, d_weight, d_k, d_v


def _backward_kernel(
    scale: float, tiles: int, page: Any, total: Any, index: Any, weight: Any, q_in: Any, d_out_in: Any, k: Any,
    v: Any, d_k_in: Any, d_v_in: Any, d_q_out: Any, d_weight: Any, d_k: Any, d_v: Any,
    q: Any, d_out: Any, d_q: Any, q_rows: Any, d_rows: Any, added: Any,
) -> None:  # fmt: skip
    head, tile = pl.program_id(0), pl.program_id(1)
    at = head * tiles + tile

    @pl.when(tile == 0)
    def _() -> None:
        pltpu.sync_copy(q_in.at[head], q)
        pltpu.sync_copy(d_out_in.at[head], d_out)
        _clear(d_q)
        q_rows[...] = jnp.zeros_like(q_rows)
        d_rows[...] = jnp.zeros_like(d_rows)

    @pl.when((tile == 0) | (page[at] != page[jnp.maximum(at - 1, 0)]))
    def _() -> None:
        d_k[...] = d_k_in[...]
        d_v[...] = d_v_in[...]

    @pl.when(tile < total[head])
    def _() -> None:
        _gather(index, (q, d_out), (q_rows, d_rows))
        mine, theirs = q_rows[...].astype(k.dtype), d_rows[...].astype(k.dtype)
        d_weights = dot(v[...], theirs, NT)
        weights = _softmax(dot(k[...], mine, NT), scale, None)
        along = jnp.sum(weights * d_weights, axis=0, keepdims=True)  # products of a row's output and its cotangent
        d_weight[...] = along
        d_scores = (weights * (d_weights - along) * (weight[...] * scale)).astype(k.dtype)
        d_v[...] += dot((weights * weight[...]).astype(k.dtype), theirs, NN)
        d_k[...] += dot(d_scores, mine, NN)
        added[...] = dot(d_scores, k[...], TN)
        _scatter(index, added, d_q)

    pl.when(tile == tiles - 1)(lambda: pltpu.sync_copy(d_q, d_q_out.at[head]))


_PARAMETERS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES)


def _softmax(dots: jax.Array, scale: float, weight: jax.Array | None) -> jax.Array:
    """Of [slots, rows] along the slots, times a weight for each row."""
    weights = jnp.exp2((dots - jnp.max(dots, axis=0, keepdims=True)) * (scale * LOG2E))
    return weights * ((1.0 if weight is None else weight) / jnp.sum(weights, axis=0, keepdims=True))


def _clear(ref: Any) -> None:
    def row(i: Any, _: None) -> None:
        ref[i] = jnp.zeros(ref.shape[1:], ref.dtype)

    lax.fori_loop(0, ref.shape[0], row, None)


def _turns(index: Any) -> Any:
    return lax.div(index[0, index.shape[1] - 1] + (TOGETHER - 1), TOGETHER)


def _gather(index: Any, sources: Any, rows: Any) -> None:
    """The slabs [G, D] of a tile's queries, one under another."""

    def turn(j: Any, _: None) -> None:
        queries = [index[0, j * TOGETHER + i] for i in range(TOGETHER)]
        for source, target in zip(sources, rows, strict=True):
            size = TOGETHER * source.shape[1]
            slabs = jnp.concatenate([source[query] for query in queries])
            target[pl.ds(pl.multiple_of(j * size, TOGETHER), size)] = slabs

    lax.fori_loop(0, _turns(index), turn, None)


def _scatter(index: Any, rows: Any, sums: Any) -> None:
    """The rows of a tile's pairs onto those of their queries; no query twice but the one for none."""
    group = sums.shape[1]

    def turn(j: Any, _: None) -> None:
        queries = [index[0, j * TOGETHER + i] for i in range(TOGETHER)]
        added = rows[pl.ds(pl.multiple_of(j * TOGETHER * group, TOGETHER), TOGETHER * group)]
        # All are read before one is written: a write might be to where the next read is, as far as a compiler knows.
        found = [sums[query] + added[i * group : (i + 1) * group] for i, query in enumerate(queries)]
        for query, value in zip(queries, found, strict=True):
            sums[query] = value

    lax.fori_loop(0, _turns(index), turn, None)
