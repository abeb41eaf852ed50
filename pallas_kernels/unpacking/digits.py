"""Channels of a slot as digits that share bytes, in 2, 1.58 and 1 bits (VidKV, arXiv 2503.16257).

Runs of channels have digits of one base each. Digit j of byte i is that of channel i + j c, of the run's c bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt8

from pallas_kernels.block_ranges import divide
from pallas_kernels.gpu.flash_operands import dot as gpu_dot
from pallas_kernels.tpu.tiles import LANES, TN, dot
from pallas_kernels.unpacking.protocol import Lies, Load, Unpacking


class Run(NamedTuple):
    """channels, whose digits are below `base`, `together` of them in a byte."""

    channels: int
    base: int
    together: int

    @property
    def places(self) -> int:
        """Bytes of a slot."""
        return -(-self.channels // self.together)


SPREAD, SIGNS, TRITS = (4, 4), (2, 8), (3, 5)  # bases, and digits in a byte


@dataclasses.dataclass(frozen=True)
class DigitUnpacking(Unpacking):
    """Numbers, of each group of slots: `least` and `step` of channels in 2 bits, least + step x digit; `size` of the
    others, whose digits stand for -1 and 1, or -1, 0 and 1, times it. With `mixed` these numbers times `basis` [D, D]
    are the channels, and channel d of a group is the one in place `back[d]`.

    wide: channels in 2 bits, which come first. trits: whether the others have three digits.
    """

    wide: int = 0
    trits: bool = False
    mixed: bool = False

    @property
    def lies(self) -> Mapping[str, Lies]:
        two: dict[str, Lies] = {"least": "group", "step": "group"} if self.wide else {}
        rest: dict[str, Lies] = {"size": "group"} if self.wide < self.width else {}
        mixed: dict[str, Lies] = {"basis": "all", "back": "group"} if self.mixed else {}
        return {**two, **rest, **mixed}

    @property
    def runs(self) -> list[Run]:
        """Those that have any channels."""
        other = Run(self.width - self.wide, *(TRITS if self.trits else SIGNS))
        return [run for run in (Run(self.wide, *SPREAD), other) if run.channels]

    @property
    def by_slot(self) -> bool:
        return self.mixed

    @property
    def slots_together(self) -> int:
        return min(self.group & -self.group, 64) if self.mixed else 1

    def refused_by(self, platform: Literal["tpu", "triton"]) -> str | None:
        if self.mixed and platform == "tpu" and self.width != LANES:
            return f"channels in an order, of heads of {self.width}"
        if self.mixed and platform == "triton" and self.slots_together < 16:
            return f"groups of {self.group} slots, each of which has an order of its own"
        return None

    def plain(self, codes: UInt8[Array, "B K S c"], numbers: Mapping[str, Array]) -> Float[Array, "B K S D"]:
        found, start = [], 0
        given = {name: jnp.repeat(x, self.group, axis=2) for name, x in numbers.items() if name != "basis"}
        for run in self.runs:
            some = codes[..., start : start + run.places].astype(jnp.int32)
            digits = jnp.concatenate([some // run.base**i % run.base for i in range(run.together)], axis=3)
            found.append(_meant(run, digits[..., : run.channels], given))
            start += run.places
        whole = jnp.concatenate(found, axis=3)
        if not self.mixed:
            return whole
        whole = jnp.einsum("bkse,ed->bksd", whole, numbers["basis"][0, 0], precision="highest")
        return jnp.take_along_axis(whole, given["back"].astype(jnp.int32), axis=3)

    def on_tpu(
        self, codes: Int[Array, "c slots"], numbers: Mapping[str, Shaped[Array, "_ _"]], dtype: DTypeLike
    ) -> Float[Array, "D slots"] | Float[Array, "slots D"]:
        slots, found, start = codes.shape[1], [], 0
        row = lax.broadcasted_iota(jnp.int32, (slots // self.group, slots), 0)
        slot = lax.broadcasted_iota(jnp.int32, (slots // self.group, slots), 1)
        ones = jnp.where((slot >= row * self.group) & (slot < (row + 1) * self.group), 1.0, 0.0).astype(jnp.bfloat16)
        sizes = [name for name in ("least", "step", "size") if name in numbers]
        given = {name: dot(numbers[name].astype(jnp.bfloat16), ones, TN) for name in sizes}  # exact: one term each
        for run in self.runs:
            left, digits = codes[start : start + run.places], []
            for _ in range(run.together):
                more = _shifted(left, run.base)
                digits.append(left - run.base * more)
                left = more
            found.append(_meant(run, jnp.concatenate(digits, axis=0)[: run.channels], given))
            start += run.places
        whole = found[0] if len(found) == 1 else jnp.concatenate(found, axis=0)
        if not self.mixed:
            return whole
        whole = dot(whole.astype(dtype), numbers["basis"].astype(dtype), TN)
        back = dot(ones, numbers["back"].astype(jnp.float32).astype(jnp.bfloat16), TN).astype(jnp.int32)
        return jnp.take_along_axis(whole, back, axis=1, mode="promise_in_bounds")

    def on_gpu(self, load: Load, slot: Int[Array, " n"], channel: Int[Array, " d"], dtype: DTypeLike) -> Array:
        """Of one group where channels are mixed: its own order, and the basis, are one matrix then."""
        entry = jnp.minimum(channel, self.width - 1)[:, None]
        group, slot, channel = divide(slot, self.group)[:, None], slot[:, None], channel[None]
        found, start, first = jnp.zeros((slot.shape[0], channel.shape[1]), jnp.float32), 0, 0
        for run in self.runs:
            here = jnp.broadcast_to((channel >= first) & (channel < first + run.channels), found.shape)
            inside = jnp.clip(channel - first, 0, run.channels - 1)
            digit = divide(inside, run.places)
            whole = load("codes", slot, start + inside - digit * run.places)
            if run.base == 3:
                for i in range(1, run.together):
                    whole = jnp.where(digit >= i, _shifted(whole, 3), whole)
            else:
                whole = lax.shift_right_logical(whole, jnp.broadcast_to(digit * (run.base // 2), whole.shape))
            whole = whole - run.base * _shifted(whole, run.base)
            given = {name: load(name, group, inside) for name in (("least", "step") if run.base == 4 else ("size",))}
            found = jnp.where(here, _meant(run, whole, given), found)
            start, first = start + run.places, first + run.channels
        if not self.mixed:
            return found
        back = load("back", jnp.broadcast_to(jnp.min(group), (1, 1)), channel)
        return gpu_dot(found.astype(dtype), load("basis", entry, back).astype(dtype))


def _meant(run: Run, digits: jax.Array, given: Mapping[str, jax.Array]) -> jax.Array:
    """What digits stand for."""
    if run.base == 4:
        return given["least"].astype(jnp.float32) + given["step"].astype(jnp.float32) * digits.astype(jnp.float32)
    middle = 1 if run.base == 3 else 0.5
    return (digits.astype(jnp.float32) - middle) * (given["size"].astype(jnp.float32) * (1 / middle))


def _shifted(x: jax.Array, base: int) -> jax.Array:
    """x // base of a byte: for 3, a product that is exact up to 511."""
    return (
        lax.shift_right_logical(x * 171, jnp.int32(9))
        if base == 3
        else lax.shift_right_logical(x, jnp.int32(base // 2))
    )
