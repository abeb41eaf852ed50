"""Decoding on GPUs, in Triton: a few queries against a ring of many slots, as one partial of attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.coded import Coded
from pallas_kernels.gpu import slot_attention, slot_codes
from pallas_kernels.partial import Partial
from pallas_kernels.unpacking.protocol import Unpackable


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
    interpret: bool = False,
) -> Partial:
    """`pallas_kernels.api.decode_attention` on a GPU; see there for the arguments.

    Slots are taken by age from the oldest that a query sees to the newest: no other is read.
    """
    slots, queries = k.shape[2], q.shape[1]
    operands: dict[str, Array | Coded | Unpackable] = {"k": k, "v": v, "count": count.astype(jnp.int32)}
    operands["first"] = jnp.zeros_like(count, jnp.int32) if first is None else first.astype(jnp.int32)
    if k_scale is not None and v_scale is not None:
        operands |= {"k_scale": k_scale, "v_scale": v_scale}

    together = slot_codes.slots_together(operands)

    def find(read: slot_attention.Reads, row: jax.Array) -> tuple[Any, Any, slot_attention.Place]:
        count, first = read["count"][0], read["first"][0]
        low = jnp.zeros_like(count) if window is None else jnp.maximum(count - window, 0)
        start = low if together == 1 else low - lax.rem(first + low, jnp.int32(together))

        def place(age: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
            slot = first + age
            slot = jnp.where(slot >= slots, slot - slots, slot)
            holds = None if together == 1 else age >= low
            if window is None or queries == 1:
                return slot, holds, None
            return slot, holds, age[None] >= (count + lax.rem(row, jnp.int32(queries)) - window)[:, None]

        return start, count, place

    return slot_attention.attend(
        "decode_attention", find, q, operands, scale=scale, softcap=softcap, splits=splits, block=block,
        most=slots if window is None else min(slots, window), interpret=interpret,
    )  # fmt: skip
