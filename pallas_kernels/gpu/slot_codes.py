"""Slots in codes as the GPU's decoding kernels read them: each slot its bytes, by its number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.block_ranges import divide
from pallas_kernels.coded import Along, Coded, Kind, float8, power
from pallas_kernels.unpacking.protocol import Unpackable, Unpacking

Reads = Mapping[str, Any]  # references of a kernel by name


@dataclasses.dataclass(frozen=True)
class Coding:
    """bits, group, along, zero, kind: of `Coded` slots. channels: that share a least and a step. rank: of factors.
    kept: channels of each slot that are kept beside the codes."""

    bits: int
    group: int
    along: Along
    zero: int
    kind: Kind
    channels: int
    rank: int
    kept: int

    @classmethod
    def from_coded(cls, x: Coded) -> Coding:
        """How they lie."""
        runs = 1 if x.step is None else x.step.shape[3]
        channels = 1 if x.along == "channel" else x.shape[3] // runs
        rank, kept = (0 if y is None else y.shape[3] for y in (x.tokens, x.kept))
        return cls(x.bits, x.group, x.along, x.zero, x.kind, channels, rank, kept)


def codings(operands: Mapping[str, Array | Coded | Unpackable]) -> dict[str, Coding | Unpacking]:
    """How what is in codes lies.

    Raises:
      ValueError: in codes that Triton kernels do not unpack.
    """
    found: dict[str, Coding | Unpacking] = {}
    for of, x in operands.items():
        if isinstance(x, Unpackable):
            if refused := x.unpacking.refused_by("triton"):
                raise ValueError(f"{refused}: the Triton kernel does not take them")
            found[of] = x.unpacking
        elif isinstance(x, Coded):
            found[of] = Coding.from_coded(x)
    return found


def slots_together(operands: Mapping[str, Array | Coded | Unpackable]) -> int:
    """How many slots have to be read together, from a multiple of it on: 1 for any."""
    return max(x.unpacking.slots_together if isinstance(x, Unpackable) else 1 for x in operands.values())


def flat(operands: Mapping[str, Array | Coded | Unpackable]) -> dict[str, Array]:
    """Codes and numbers of what is in codes as operands of their own."""
    found: dict[str, Array] = {}
    for name, x in operands.items():
        if isinstance(x, Unpackable):
            found |= {name: x.codes, **{f"{name}_{of}": array for of, array in x.numbers.items()}}
        elif isinstance(x, Coded):
            found |= {name: x.codes, **{f"{name}_{of}": array for of, (array, _) in x.numbers.items()}}
        else:
            found[name] = x
    return found


def decoded(
    coding: Coding | Unpacking,
    read: Reads,
    name: str,
    slot: jax.Array,
    channel: jax.Array,
    there: jax.Array,
    width: int,
    dtype: DTypeLike,
) -> jax.Array:
    """What the codes of slots stand for, [slots, channels] in float32; nothing is loaded of those that are not there.

    width: of heads. dtype: of queries.
    """
    if isinstance(coding, Unpacking):
        return coding.on_gpu(partial(_load, coding, read, name, there), slot, channel, dtype)
    return _decoded(coding, read, name, slot, channel, there, width)


def _decoded(
    coding: Coding,
    read: Reads,
    name: str,
    slot: jax.Array,
    channel: jax.Array,
    there: jax.Array,
    width: int,
) -> jax.Array:
    planes = 8 // coding.bits
    rows, unit = coding.group // planes, divide(slot, coding.group)
    inside = slot - unit * coding.group
    plane = divide(inside, rows)
    row = unit * rows + inside - plane * rows
    mask = there[:, None] & (channel < width)[None]

    def load(of: str, row: jax.Array, column: jax.Array) -> jax.Array:
        """Rows' numbers in these columns; whole ones as int32."""
        place = tuple(jnp.broadcast_to(x, mask.shape) for x in (row[:, None], column))
        found = plgpu.load(read[of].at[place], mask=mask, other=0)
        return found.astype(jnp.int32 if found.dtype == jnp.uint8 else jnp.float32)

    def number(of: str, column: jax.Array) -> jax.Array:
        return load(f"{name}_{of}", unit if coding.along == "channel" else slot, column)

    def of_slot(of: str, i: int) -> jax.Array:
        return plgpu.load(read[f"{name}_{of}"].at[slot, i], mask=there, other=0).astype(jnp.float32)[:, None]

    column = load(f"{name}_order", unit, channel[None]) if f"{name}_order" in read else channel[None]
    whole = load(name, row, column)
    if planes > 1:
        whole = lax.shift_right_logical(whole, jnp.broadcast_to((plane * coding.bits)[:, None], whole.shape))
        whole = whole & (2**coding.bits - 1)
    found = (whole - coding.zero).astype(jnp.float32) if coding.kind == "int" else float8(whole, coding.kind)
    run = divide(column, coding.channels)
    if f"{name}_step" in read:
        step = number("step", run)
        found *= power(step, coding.bits) if step.dtype == jnp.int32 else step
    if f"{name}_least" in read:
        found += number("least", run)
    if f"{name}_stretch" in read:
        found *= load(f"{name}_stretch", unit, channel[None])
    for i in range(coding.rank):
        found += of_slot("tokens", i) * load(f"{name}_directions", unit, (i * width + channel)[None])
    for i in range(coding.kept):
        here = of_slot("channels", i).astype(jnp.int32) == channel[None]
        found = jnp.where(here, of_slot("kept", i), found)
    return found


def _load(
    coding: Unpacking, read: Reads, name: str, there: jax.Array, of: str, row: jax.Array, column: jax.Array
) -> jax.Array:
    """What `Unpacking.on_gpu` asks for: nothing of slots that are not there, or beyond the width."""
    ref = read[name if of == "codes" else f"{name}_{of}"]
    shape = jnp.broadcast_shapes(row.shape, column.shape)
    rows, columns = (jnp.broadcast_to(x, shape) for x in (row, column))
    mask = (jnp.arange(shape[1]) < coding.width)[None]
    if row.shape[0] > 1 and (of == "codes" or coding.lies[of] != "all"):
        mask = mask & there[:, None]
    found = plgpu.load(ref.at[rows, columns], mask=jnp.broadcast_to(mask, shape), other=0)
    return found.astype(jnp.float32 if jnp.issubdtype(found.dtype, jnp.floating) else jnp.int32)
