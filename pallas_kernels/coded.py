"""Keys or values in few bits, as the decoding kernels read them: `Coded`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, Shaped, UInt8

Along = Literal["channel", "token"]
Kind = Literal["int", "e4m3", "e5m2"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
    """Slots [B, K, S, D] whose numbers are codes, and what the codes stand for. What a codec does not have is None.

    Slots lie in groups of `group`. A group's codes fill `group * bits / 8` rows of bytes: with 4 bits slot i of a group
    has the lower half of a byte of row i, and slot i + group / 2 the upper half. Numbers are made in this order:

    1. `least + step * (code - zero)` (KIVI, 2402.02750), or the float of 8 bits that a code is. A step of whole numbers
       is the exponent of a power of two (block floats, 2403.20137), see `power`.
    2. Channel d is the one of these in place `order[d]`.
    3. Each channel is multiplied with its `stretch` (FireQ, 2505.20839).
    4. The product of a slot's `tokens` and the group's `directions` is added, and channels that `channels` names are
       what was `kept` of them (GEAR, 2403.05527).

    codes: of all groups. least, step: along "channel" one of each channel for the slots of a group, [B, K, S / group,
    D]; along "token" one of each slot for each of E runs of channels, [B, K, S, E]. order, stretch: of each channel for
    the slots of a group. tokens [B, K, S, r], directions [B, K, S / group, r D]. kept, channels: [B, K, S, n]. Floats
    among them are bfloat16, whole numbers bytes.
    """

    codes: UInt8[Array, "B K R D"]
    least: Float[Array, "B K _ _"] | None
    step: Shaped[Array, "B K _ _"] | None
    bits: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    along: Along = dataclasses.field(metadata={"static": True})
    zero: int = dataclasses.field(default=0, metadata={"static": True})
    kind: Kind = dataclasses.field(default="int", metadata={"static": True})
    order: UInt8[Array, "B K N D"] | None = None
    stretch: Float[Array, "B K N D"] | None = None
    tokens: Float[Array, "B K S r"] | None = None
    directions: Float[Array, "B K N rD"] | None = None
    kept: Float[Array, "B K S n"] | None = None
    channels: UInt8[Array, "B K S n"] | None = None

    @property
    def planes(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def rows(self) -> int:
        """Rows of bytes that a group has."""
        return self.group // self.planes

    @property
    def shape(self) -> tuple[int, ...]:
        batch, heads, rows, width = self.codes.shape
        return batch, heads, rows * self.planes, width

    def in_pages(self, page: int) -> Coded:
        """The same slots in groups of which a page has whole ones, where every token is coded by itself, in bytes.

        The size of such groups means nothing; of others the codes depend on it.
        """
        groupwise = self.order, self.stretch, self.directions
        if self.planes > 1 or self.along != "token" or any(x is not None for x in groupwise):
            return self
        return dataclasses.replace(self, group=math.gcd(self.group, page))

    @property
    def numbers(self) -> dict[str, tuple[Array, Along]]:
        """What there is beside the codes: along "channel" one row a group of slots, along "token" one row a slot."""
        found: dict[str, tuple[Array | None, Along]] = {
            "least": (self.least, self.along), "step": (self.step, self.along),
            "order": (self.order, "channel"), "stretch": (self.stretch, "channel"),
            "tokens": (self.tokens, "token"), "directions": (self.directions, "channel"),
            "kept": (self.kept, "token"), "channels": (self.channels, "token"),
        }  # fmt: skip
        return {name: (x, along) for name, (x, along) in found.items() if x is not None}

    def widened(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "B K S D"]:
        """The numbers, all of them in memory: what the kernels never make."""
        batch, heads, slots, width = self.shape
        codes = self.codes.reshape(batch, heads, -1, 1, self.rows, width)
        shift = (self.bits * jnp.arange(self.planes, dtype=jnp.uint8))[:, None, None]
        whole = ((codes >> shift) & jnp.uint8(2**self.bits - 1)).reshape(batch, heads, slots, width)
        found = (whole.astype(dtype) - self.zero) if self.kind == "int" else float8(whole, self.kind).astype(dtype)
        if self.step is not None:
            step = self.step if self.step.dtype != jnp.uint8 else power(self.step, self.bits)
            found = found * self._of_each(step.astype(dtype))
        if self.least is not None:
            found = found + self._of_each(self.least.astype(dtype))
        if self.order is not None:
            order = jnp.repeat(self.order.astype(jnp.int32), self.group, axis=2)
            found = jnp.take_along_axis(found, order, axis=3)
        if self.stretch is not None:
            found = found * jnp.repeat(self.stretch.astype(dtype), self.group, axis=2)
        if self.tokens is not None and self.directions is not None:
            ways = jnp.repeat(self.directions.astype(dtype), self.group, axis=2).reshape(batch, heads, slots, -1, width)
            found = found + jnp.einsum("bksr,bksrd->bksd", self.tokens.astype(dtype), ways)
        if self.kept is not None and self.channels is not None:
            for i in range(self.kept.shape[3]):
                here = self.channels[..., i : i + 1] == jnp.arange(width, dtype=jnp.uint8)
                found = jnp.where(here, self.kept[..., i : i + 1].astype(dtype), found)
        return found

    def _of_each(self, x: Float[Array, "B K _ _"]) -> Float[Array, "B K S #D"]:
        if self.along == "channel":
            return jnp.repeat(x, self.group, axis=2)
        return jnp.repeat(x, self.shape[3] // x.shape[3], axis=3)


def power(exponent: Integer[Array, "..."], bits: int) -> Float[Array, "..."]:
    """What the last digit of a mantissa of so many bits counts, sign included: a power of two, as float32.

    The exponent is float32's. Slots that hold nothing have the exponent 0, and stand for numbers all the same.
    """
    last = jnp.maximum(exponent.astype(jnp.int32), bits) - (bits - 2)
    return jax.lax.bitcast_convert_type(last << 23, jnp.float32)


def float8(bits: Integer[Array, "..."], kind: Kind) -> Float[Array, "..."]:
    """The floats that have these eight bits, as float32. Infinities, which are never stored, become NaN.

    XLA's CPU backend has no floats of eight bits: it would convert a whole buffer for every read or write of a few.
    """
    behind, bias, special = (3, 7, 0x7F) if kind == "e4m3" else (2, 15, 0x7C)
    wide = bits.astype(jnp.int32)
    size = wide & 0x7F
    normal = jax.lax.bitcast_convert_type((size << (23 - behind)) + ((127 - bias) << 23), jnp.float32)
    small = size.astype(jnp.float32) * 2.0 ** (1 - bias - behind)
    found = jnp.where(size < 1 << behind, small, normal)
    found = jnp.where(size >= special, jnp.nan, found)
    return jnp.where(wide > size, -found, found)
