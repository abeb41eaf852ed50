"""Decoding over chosen pages on GPUs, in Triton: the numbers of the pages are read in the kernel, then their slots."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.block_ranges import divide
from pallas_kernels.coded import Coded
from pallas_kernels.gpu import slot_attention
from pallas_kernels.partial import Partial
from pallas_kernels.unpacking.protocol import Unpackable


def paged_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B K S D"] | Coded | Unpackable,
    v: Float[Array, "B K S D"] | Coded | Unpackable,
    pages: Int32[Array, "B K N"],
    count: Int32[Array, " B"],
    *,
    page_size: int,
    scale: float,
    first: Int32[Array, " B"] | None = None,
    softcap: float | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> Partial:
    """`pallas_kernels.api.paged_attention` on a GPU; see there for the arguments.

    Slots of a page that hold nothing are not read either.
    """
    slots, entries = k.shape[2], pages.shape[2]
    operands: dict[str, Array | Coded | Unpackable] = {
        "k": k,
        "v": v,
        "count": count.astype(jnp.int32),
        "pages": pages.astype(jnp.int32),
    }
    operands["first"] = jnp.zeros_like(count, jnp.int32) if first is None else first.astype(jnp.int32)

    def find(read: slot_attention.Reads, row: jax.Array) -> tuple[Any, Any, slot_attention.Place]:
        count, first = read["count"][0], read["first"][0]
        turn = jnp.arange(pl.next_power_of_2(entries))
        named = plgpu.load(read["pages"].at[turn], mask=turn < entries, other=-1) >= 0

        def place(entry: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
            page = plgpu.load(read["pages"].at[divide(entry, page_size)])
            slot = page * page_size + lax.rem(entry, jnp.int32(page_size))
            age = slot - first
            return slot, (page >= 0) & (jnp.where(age < 0, age + slots, age) < count), None

        return jnp.zeros_like(count), jnp.sum(named.astype(jnp.int32)) * page_size, place

    return slot_attention.attend(
        "paged_attention", find, q, operands, scale=scale, softcap=softcap, splits=None, block=block,
        most=entries * page_size, listed=True, interpret=interpret,
    )  # fmt: skip


def pool_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "K P S D"],
    v: Float[Array, "K P S D"],
    pages: Int32[Array, "B N"],
    count: Int32[Array, " B"],
    *,
    scale: float,
    softcap: float | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> Partial:
    """`pallas_kernels.api.pool_attention` on a GPU; see there for the arguments."""
    last, size = k.shape[1:3]
    entries = pages.shape[1] * size
    flat = {name: x.reshape(1, x.shape[0], last * size, x.shape[3]) for name, x in (("k", k), ("v", v))}
    table = jnp.clip(pages, 0, last - 1).astype(jnp.int32)
    operands = {**flat, "count": jnp.minimum(count, entries).astype(jnp.int32), "pages": table}

    def find(read: slot_attention.Reads, row: jax.Array) -> tuple[Any, Any, slot_attention.Place]:
        count = read["count"][0]

        def place(entry: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
            page = plgpu.load(read["pages"].at[divide(entry, size)])
            return page * size + lax.rem(entry, jnp.int32(size)), None, None

        return jnp.zeros_like(count), count, place

    return slot_attention.attend(
        "pool_attention", find, q, operands, scale=scale, softcap=softcap, splits=None, block=block, most=entries,
        listed=True, interpret=interpret,
    )  # fmt: skip


def shared_pool_attention(
    q: Float[Array, "B C H D"],
    k: Float[Array, "K P S D"],
    v: Float[Array, "K P S D"],
    pages: Int32[Array, " M"],
    readers: Int32[Array, " M"],
    count: Int32[Array, ""],
    *,
    scale: float,
    softcap: float | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> Partial:
    """`pallas_kernels.api.shared_pool_attention` on a GPU; see there for the arguments.

    All rows are one, whose queries are masked: bit b of a page's `readers` says whether row b has it. `count`: pages.
    """
    last, size = k.shape[1:3]
    rows, queries = q.shape[:2]
    flat = {name: x.reshape(1, x.shape[0], last * size, x.shape[3]) for name, x in (("k", k), ("v", v))}
    table = jnp.clip(pages, 0, last - 1).astype(jnp.int32)
    operands = {**flat, "count": count[None].astype(jnp.int32), "pages": table[None], "readers": readers[None]}

    def find(read: slot_attention.Reads, row: jax.Array) -> tuple[Any, Any, slot_attention.Place]:
        count = read["count"][0] * size
        whose = divide(lax.rem(row, jnp.int32(rows * queries)), queries)

        def place(entry: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
            number = divide(entry, size)
            page, bits = plgpu.load(read["pages"].at[number]), plgpu.load(read["readers"].at[number])
            shape = (len(row), len(entry))
            bits, shift = jnp.broadcast_to(bits[None], shape), jnp.broadcast_to(whose[:, None], shape)
            seen = (lax.shift_right_logical(bits, shift) & 1) > 0
            return page * size + lax.rem(entry, jnp.int32(size)), None, seen

        return jnp.zeros_like(count), count, place

    part = slot_attention.attend(
        "shared_pool_attention", find, q.reshape(1, -1, *q.shape[2:]), operands, scale=scale, softcap=softcap,
        splits=None, block=block, most=len(pages) * size, listed=True, interpret=interpret,
    )  # fmt: skip
    return Partial(part.out.reshape(q.shape), part.lse.reshape(q.shape[:3]))
