"""Slots in codes as the TPU's decoding kernels read them: what lies where, and how a block is widened in registers.

`Coded` slots are widened here; others by their codec's own `Unpacking`, and their codes come with slots behind.

Numbers along channels come a group a row, as they are stored. Those along tokens come with slots behind, as a TPU lays
them out anyway: [E, slots]. A product with ones and zeros turns them, exactly, into [slots, D]; it is spared where
logits or weights, which are narrow, can take a slot's step.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.coded import Along, Coded, Kind, float8, power
from pallas_kernels.tpu.tiles import LANES, NN, SUBLANES, TN, dot
from pallas_kernels.unpacking.protocol import Unpackable, Unpacking

TILE = 16  # rows of bfloat16 numbers that fill a tile


class Lying(NamedTuple):
    """bits: of a code. group: slots whose codes fill whole rows of bytes. zero, kind: as in `Coded`. along: of each of
    the numbers by name."""

    bits: int
    group: int
    zero: int
    kind: Kind
    along: tuple[tuple[str, Along], ...]

    @property
    def planes(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    def numbers_along(self, name: str) -> Along | None:
        """Along what some numbers are; None where there are none."""
        return dict(self.along).get(name)

    @property
    def others(self) -> bool:
        """Whether there is more than a least and a step."""
        return self.kind != "int" or any(name not in ("least", "step") for name, _ in self.along)


def lying(k: Coded | Unpackable, v: Coded | Unpackable) -> tuple[Lying | Unpacking, Lying | Unpacking]:
    """How keys and values lie.

    Raises:
      ValueError: they lie as these kernels do not read them.
    """
    return _lying(k), _lying(v)


def _lying(x: Coded | Unpackable) -> Lying | Unpacking:
    if isinstance(x, Unpackable):
        if refused := x.unpacking.refused_by("tpu"):
            raise ValueError(f"{refused}: TPUs do not take them")
        return x.unpacking
    if x.rows % SUBLANES:
        raise ValueError(f"groups of {x.group} slots in {x.bits} bits: TPUs take whole {SUBLANES} rows of bytes")
    if x.order is not None and x.shape[3] != LANES:
        raise ValueError(f"channels in an order, of heads of {x.shape[3]}: TPUs take heads of {LANES}")
    return Lying(x.bits, x.group, x.zero, x.kind, tuple((name, along) for name, (_, along) in x.numbers.items()))


def lies(lying: Lying | Unpacking | None, number: str) -> int | Literal["columns", "all"]:
    """How many slots a row of an operand is of; or whether slots are its columns, or all of it belongs to each block.

    The codes, or plain keys or values, are the number "".
    """
    if lying is None:
        return "columns" if number else 1
    if isinstance(lying, Lying):
        if not number:
            return lying.planes
        return lying.group if lying.numbers_along(number) == "channel" else "columns"
    found = lying.lies[number] if number else "slot"
    return lying.group if found == "group" else "columns" if found == "slot" else "all"


def across_groups(lying: Lying | Unpacking) -> tuple[str, ...]:
    """Numbers of groups of slots that are summed over groups: nothing of them may lie beyond a ring's end."""
    if isinstance(lying, Lying):
        return ("directions",) if lying.numbers_along("directions") else ()
    return tuple(name for name, where in lying.lies.items() if where == "group")


def cache_operands(k: Coded | Unpackable, v: Coded | Unpackable) -> dict[str, Array]:
    """Arrays by name: k and v, and k_least, v_step and so on; numbers along tokens with slots behind."""
    found: dict[str, Array] = {}
    for of, x in (("k", k), ("v", v)):
        if isinstance(x, Unpackable):
            found[of] = jnp.swapaxes(x.codes, 2, 3)
            for name, where in x.unpacking.lies.items():
                array = x.numbers[name]
                found[f"{of}_{name}"] = jnp.swapaxes(array, 2, 3) if where == "slot" else array
            continue
        found[of] = x.codes
        for name, (array, along) in x.numbers.items():
            found[f"{of}_{name}"] = array if along == "channel" else jnp.swapaxes(array, 2, 3)
    return found


def widen(k: Lying | Unpacking, v: Lying | Unpacking, block: dict[str, Any]) -> None:
    """Keys and values in the place of their codes, [slots, D], in the queries' dtype; [D, slots] as "k_columns", so.

    Keys whose slots have one step each, and no least, leave it to the logits ("k_scale"). Values leave leasts and steps
    of their slots to the weights, where they have no other numbers.
    """
    for name, lying in (("k", k), ("v", v)):
        if isinstance(lying, Unpacking):
            given = {of: block.pop(f"{name}_{of}") for of in lying.lies}
            numbers = lying.on_tpu(block.pop(name).astype(jnp.int32), given, block["q"].dtype)
            block[name if lying.by_slot else f"{name}_columns"] = numbers.astype(block["q"].dtype)
            continue
        given = {of: block.pop(f"{name}_{of}") for of, _ in lying.along}
        numbers, dtype = _numbers(block[name], lying), block["q"].dtype
        to_weights = name == "v" and not lying.others and lying.numbers_along("step") == "token"
        if to_weights and not jnp.issubdtype(given["step"].dtype, jnp.integer):
            block |= {f"v_{of}": x for of, x in given.items()}
        else:
            extra = set(given) - {"step", "stretch"}
            if name == "k" and lying.numbers_along("step") == "token" and not extra and len(given["step"]) == 1:
                block["k_scale"] = _steps(given.pop("step"), lying)
            numbers = _meant(numbers, lying, given)
        block[name] = numbers.reshape(-1, numbers.shape[-1]).astype(dtype)


def _meant(numbers: jax.Array, lying: Lying, given: dict[str, jax.Array]) -> jax.Array:
    """What whole numbers [groups, slots, D] stand for."""
    each, width = numbers.shape[1:]

    def wide(name: str) -> jax.Array:
        x = _steps(given[name], lying) if name == "step" else given[name].astype(jnp.float32)
        return x[:, None] if lying.numbers_along(name) == "channel" else _spread(x, width).reshape(numbers.shape)

    if "step" in given:
        numbers = numbers * wide("step")
    if "least" in given:
        numbers = numbers + wide("least")
    if "order" in given:
        order = jnp.broadcast_to(given["order"].astype(jnp.int32)[:, None], numbers.shape).reshape(-1, width)
        flat = numbers.reshape(-1, width)
        numbers = jnp.take_along_axis(flat, order, axis=1, mode="promise_in_bounds").reshape(numbers.shape)
    if "stretch" in given:
        numbers = numbers * wide("stretch")
    if "tokens" in given:
        numbers = numbers + _low_rank(given["tokens"], given["directions"], each).reshape(numbers.shape)
    if "kept" in given:
        numbers = numbers.reshape(-1, width)
        channel = lax.broadcasted_iota(jnp.int32, numbers.shape, 1).astype(jnp.float32)
        kept, places = given["kept"].astype(jnp.float32), given["channels"].astype(jnp.int32).astype(jnp.float32)
        for i in range(len(kept)):
            here = _spread(places[i : i + 1], width) == channel
            numbers = jnp.where(here, _spread(kept[i : i + 1], width), numbers)
    return numbers


def _steps(step: jax.Array, lying: Lying) -> jax.Array:
    """Steps in float32; whole numbers are exponents."""
    whole = jnp.issubdtype(step.dtype, jnp.integer)
    return power(step, lying.bits) if whole else step.astype(jnp.float32)


def _numbers(codes: jax.Array, lying: Lying) -> jax.Array:
    """Codes [rows of bytes, D] as numbers [groups, slots, D], float32; the code `zero` is 0."""
    groups = codes.shape[0] * lying.planes // lying.group
    wide = codes.astype(jnp.int32).reshape(groups, -1, codes.shape[1])
    if lying.kind != "int":
        return float8(wide, lying.kind)
    planes = [lax.shift_right_logical(wide, jnp.int32(lying.bits * i)) for i in range(lying.planes)]
    last = lying.planes - 1
    planes = [x if i == last else x & (2**lying.bits - 1) for i, x in enumerate(planes)]
    whole = jnp.concatenate(planes, axis=1)
    return (whole - lying.zero if lying.zero else whole).astype(jnp.float32)


def _spread(x: jax.Array, width: int) -> jax.Array:
    """Numbers [E, slots] that bfloat16 has, as [slots, D]: of a slot one for each of E runs of channels."""
    rows, slots = x.shape
    filled = -(-rows // TILE) * TILE
    if rows == 1:  # what stands in the other rows is multiplied with 0
        padded = jnp.broadcast_to(x, (filled, slots))
    else:
        padded = jnp.concatenate((x, jnp.zeros((filled - rows, slots), x.dtype)), axis=0) if filled > rows else x
    row = lax.broadcasted_iota(jnp.int32, (filled, width), 0)
    channel = lax.broadcasted_iota(jnp.int32, (filled, width), 1)
    run = width // rows
    ones = jnp.where((channel >= row * run) & (channel < (row + 1) * run), 1.0, 0.0)
    return dot(padded.astype(jnp.bfloat16), ones.astype(jnp.bfloat16), TN)


def _low_rank(tokens: jax.Array, directions: jax.Array, each: int) -> jax.Array:
    """[slots, D] of factors [r, slots] and [groups, r D], each group of `each` slots by its own: one product."""
    (rank, slots), groups = tokens.shape, len(directions)
    group = lax.broadcasted_iota(jnp.int32, (groups, slots), 0)
    slot = lax.broadcasted_iota(jnp.int32, (groups, slots), 1)
    here = (slot >= group * each) & (slot < (group + 1) * each)
    tokens, directions = tokens.astype(jnp.float32), directions.astype(jnp.float32)
    width = directions.shape[1] // rank
    left = [jnp.where(here, jnp.broadcast_to(tokens[i : i + 1], here.shape), 0.0) for i in range(rank)]
    right = [directions[:, i * width : (i + 1) * width] for i in range(rank)]
    return dot(
        jnp.concatenate(left, axis=0).astype(jnp.bfloat16), jnp.concatenate(right, axis=0).astype(jnp.bfloat16), TN
    )


def weighted(weights: jax.Array, codes: jax.Array, step: jax.Array, least: jax.Array | None) -> jax.Array:
    """Sums [rows, D] of values by weights [rows, slots]; least and step are [runs of channels, slots]."""
    rows, runs = weights.shape[0], step.shape[0]
    step = step.astype(jnp.float32)
    scaled = jnp.concatenate([weights * step[i : i + 1] for i in range(runs)], axis=0)
    found = dot(scaled.astype(codes.dtype), codes, NN)
    channel = lax.broadcasted_iota(jnp.int32, (rows, codes.shape[1]), 1)
    total = jnp.zeros((rows, codes.shape[1]), jnp.float32)
    for i in range(runs):
        one = found[i * rows : (i + 1) * rows]
        if least is not None:
            one = one + jnp.sum(weights * least[i : i + 1].astype(jnp.float32), axis=1, keepdims=True)
        total = one if i == 0 else jnp.where(channel >= i * (codes.shape[1] // runs), one, total)
    return total
