"""Decoding on TPUs: a few queries against a cache of many slots, as one partial of attention.

What counts is that each slot is read once, and only if it holds something. The rows of a product are all queries of a
key head together, and blocks of slots behind the last filled one are not fetched. Slots may be split into shares that
different cores work on; their partials are merged (Lean Attention, 2405.10480).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.coded import Coded
from pallas_kernels.partial import Partial, merge
from pallas_kernels.tpu.slots import codes, online_softmax
from pallas_kernels.tpu.tiles import LANES
from pallas_kernels.unpacking.protocol import Unpackable, Unpacking, broadcast_index, in_order

BLOCK = 1024  # slots


@dataclasses.dataclass(frozen=True)
class _Static:
    """scale, softcap: of the logits. window: tokens before a query that it sees, None for all. slots: of the ring; the
    last block may reach beyond. queries: of one row and head. blocks: of slots in a share. k, v: how codes lie; None
    where keys and values are none."""

    scale: float
    softcap: float | None
    window: int | None
    slots: int
    queries: int
    block: int
    blocks: int
    k: codes.Lying | Unpacking | None = None
    v: codes.Lying | Unpacking | None = None

    def filled(self, count: Any, first: Any) -> Any:
        """How many slots from the first on may hold something."""
        return jnp.minimum(first + count, self.slots)


def decode_attention(
    q: Float[Array, "B C H D"],
    k: Array | Coded | Unpackable,
    v: Array | Coded | Unpackable,
    count: Int32[Array, " B"],
    *,
    scale: float,
    first: Int32[Array, " B"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    k_scale: Float[Array, "B K S"] | None = None,
    v_scale: Float[Array, "B K S"] | None = None,
    splits: int | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> Partial:
    """`pallas_kernels.api.decode_attention` on a TPU; see there for the arguments.

    block: slots that are read at once, a multiple of 128. splits: shares of the slots.
    """
    splits = splits or 1
    queries, key_heads, slots = q.shape[1], k.shape[1], k.shape[2]
    block = min(block or BLOCK, slots if slots < LANES else slots // LANES * LANES)
    lying: tuple[Any, Any] = (None, None)
    cache: dict[str, Any] = {"k": k, "v": v}
    kinds = Coded, Unpackable
    if isinstance(k, kinds) and isinstance(v, kinds):
        lying, cache = codes.lying(k, v), codes.cache_operands(k, v)
        whole = codes.TILE * math.lcm(k.group, v.group)  # slots whose leasts and steps fill tiles
        block = slots if slots <= whole else -(-block // whole) * whole
    elif k_scale is not None and v_scale is not None:
        cache |= {"k_scale": k_scale[:, :, None], "v_scale": v_scale[:, :, None]}
    blocks = -(-slots // (block * splits))
    static = _Static(scale, softcap, window, slots, queries, block, blocks, *lying)
    orders = [x.order if isinstance(x, Unpacking) else None for x in lying]
    grouped = online_softmax.grouped(in_order(q, orders[0]), key_heads)
    held = jnp.stack([count, jnp.zeros_like(count) if first is None else first])
    out, lse = _run_kernel(static, splits, interpret, held.astype(jnp.int32), {"q": grouped, **cache})

    part = merge(*(online_softmax.ungrouped(out[:, :, i], lse[:, :, i], q) for i in range(splits)))
    return Partial(in_order(part.out, orders[1], back=True), part.lse)


def _run_kernel(
    static: _Static, splits: int, interpret: Any, held: Int32[Array, "2 B"], arrays: Mapping[str, Array]
) -> tuple[Array, Array]:
    """Output [B, K, splits, rows, D] and log-sum-exp [B, K, splits, rows, LANES]."""
    batch, heads, rows, width = arrays["q"].shape
    names = list(arrays)

    def at(b: Any, share: Any, n: Any, held: Any) -> Any:
        """The block of slots of a step: past the last one that holds something, that one again."""
        filled = static.filled(held[0, b], held[1, b])
        last = jnp.maximum(lax.div(filled + static.block - 1, jnp.int32(static.block)) - 1, 0)
        return jnp.minimum(share * static.blocks + n, last)

    def spec(name: str) -> Any:
        """The rows or the columns of a block of slots, or all that there is of a head."""
        if name == "q":
            return pl.BlockSpec((None, None, rows, width), lambda b, h, share, n, held: (b, h, 0, 0))
        shape = arrays[name].shape
        place = codes.lies(static.k if name[0] == "k" else static.v, name[2:])

        def index(b: Any, h: Any, share: Any, n: Any, held: Any) -> Any:
            block = at(b, share, n, held)
            of = (0, 0) if place == "all" else (0, block) if place == "columns" else (block, 0)
            return broadcast_index(b, shape[0]), broadcast_index(h, shape[1]), *of

        if place == "all":
            return pl.BlockSpec((None, None, *shape[2:]), index)
        block = (shape[2], static.block) if place == "columns" else (static.block // place, shape[3])
        return pl.BlockSpec((None, None, *block), index)

    def result(columns: int) -> Any:
        return pl.BlockSpec((None, None, None, rows, columns), lambda b, h, share, n, held: (b, h, share, 0, 0))

    call = pl.pallas_call(
        partial(_kernel, static, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, splits, static.blocks),
            in_specs=[spec(name) for name in names],
            out_specs=[result(width), result(LANES)],
            scratch_shapes=online_softmax.scratch(rows, width),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, splits, rows, columns), jnp.float32) for columns in (width, LANES)
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )
    out, lse = call(held, *(arrays[name] for name in names))
    return out, lse


def _kernel(static: _Static, names: list[str], held_ref: Any, *refs: Any) -> None:
    read = dict(zip(names, refs, strict=False))
    out, lse, *state = refs[len(names) :]
    row, n = pl.program_id(0), pl.program_id(3)
    count, first = held_ref[0, row], held_ref[1, row]
    slot = (pl.program_id(2) * static.blocks + n) * static.block
    pl.when(n == 0)(partial(online_softmax.clear, state))
    wrapped = first + count > static.slots

    @pl.when((slot < static.filled(count, first)) & (wrapped | (slot + static.block > first)))
    def _() -> None:
        block = {name: ref[...] for name, ref in read.items()}
        beyond = static.slots % static.block != 0  # slots of the last block have weights of 0, but might be NaN
        if static.k is not None and static.v is not None:
            for of, lying in (("k", static.k), ("v", static.v)):
                for name in codes.across_groups(lying) if beyond else ():  # each slot's product has all groups
                    some = block[f"{of}_{name}"]
                    wide = some.astype(jnp.int32 if some.dtype == jnp.uint8 else jnp.float32)
                    block[f"{of}_{name}"] = _inside(static, wide, slot, 0, lying.group)
            codes.widen(static.k, static.v, block)
        if beyond:
            scaled: list[str] = [name for name in ("v_scale", "v_least", "v_step") if name in block]
            columns = bool(scaled) or "v_columns" in block
            for name in scaled or ["v_columns" if columns else "v"]:
                x = block[name].astype(jnp.float32) if scaled else block[name]
                block[name] = _inside(static, x, slot, 1 if columns else 0)
        shape = block["q"].shape[0], static.block
        index = slot + lax.broadcasted_iota(jnp.int32, shape, 1)
        age = online_softmax.age(index, first, static.slots)
        seen = (age < count) & (index < static.slots)
        if static.window is not None:
            query = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 0), jnp.int32(static.queries))
            seen &= age >= count + query - static.window
        online_softmax.add(static.scale, static.softcap, block, seen, state)

    pl.when(n == static.blocks - 1)(partial(online_softmax.finish, static.scale, static.softcap, state, out, lse))


def _inside(static: _Static, x: jax.Array, slot: Any, axis: int, each: int = 1) -> jax.Array:
    """Zeros in the place of what lies beyond the ring; along an axis lie slots from one on, or groups of `each`."""
    index = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(slot + index * each < static.slots, x, 0)
