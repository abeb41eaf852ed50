"""`Int`: whole numbers of 8, 4, 2 or 1 bits between the least and the greatest of a group (KIVI, arXiv 2402.02750)."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.coded import Along, Coded
from streamjax.field_checks import LATER, Count, Interval, Size, check_fields
from streamjax.kv.codecs.codec import LISTED, Codec, Codes, GroupedCodec, Role

Bits = Literal[8, 4, 2, 1]
Fit = Literal["range", "error"]
FewChannels = Annotated[int, Interval(0, 32)]  # of a head, apart from the others: half of one of 64 channels
PARTS = (0.9, 0.8, 0.7, 0.6, 0.5)  # of a group's range
ERROR_UNITS = 2**11  # of the range: the squares of 512 errors of a whole range fit 32 bits
_HIGH_HALF = 0xFFFF0000  # of a float32: what bfloat16 keeps


@dataclasses.dataclass(frozen=True)
class Int(GroupedCodec):
    """A number is `least + step * code`, with a least and a step for each group, both bfloat16.

    Keys have channels that are large in every token, so they are coded by channel, over `group` tokens; values are
    coded by token, over `group` channels or the largest smaller part of a head that divides it. A group of tokens waits
    in full precision until it is full, and the newest `residual` tokens always do.

    Args:
      bits: of a code.
      keys, values: "channel": each channel of `group` tokens has a least and a step; "token": each token.
      group: numbers that share them.
      residual: newest tokens in full precision, a multiple of `group`.
      fit: "range": codes reach from a group's least number to its greatest; "error": over the part of that range, all
        of it or as little as half of it, that leaves the smallest squared error. Numbers outside take the nearest code.

    Raises:
      ValueError: a residual that is no multiple of the group.
    """

    bits: Bits = 8  # type: ignore[assignment]
    keys: Along = "channel"
    values: Along = "token"
    group: Size = 64
    residual: Count = 0
    fit: Fit = dataclasses.field(default="range", metadata=LATER)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.residual % self.group:
            raise ValueError(f"Int.residual must be a multiple of the group of {self.group}, got {self.residual}")
        if self.tokens % (8 // self.bits):
            raise ValueError(f"Int.group of {self.group} tokens does not fill bytes with codes of {self.bits} bits")

    def one_by_one(self) -> Codec:
        return IntByToken(self.bits, self.group, self.fit)

    def along(self, role: Role) -> Along:
        return self.keys if role == "k" else self.values

    def for_kernels(
        self, codes: Shaped[Array, "B K R c"], numbers: tuple[Array, ...], role: Role, *tables: Array
    ) -> Coded | None:
        least, step = numbers
        return Coded(codes, least, step, self.bits, self.group, self.along(role))

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Array) -> Codes:
        if self.along(role) == "channel":
            return quantised(x, self.bits, axis=3, fit=self.fit)
        return by_token(x, self.bits, self.group, self.fit)

    def decode(self, codes: Codes, role: Role, *tables: Array) -> Float[Array, "B K N G D"]:
        return dequantised(codes)


@dataclasses.dataclass(frozen=True)
class IntByToken(Codec):
    """`Int` where every token has its own least and step for keys and values alike, `group` channels at a time."""

    bits: Bits = 8  # type: ignore[assignment]
    group: Size = 64
    fit: Fit = dataclasses.field(default="range", metadata=LATER)

    def one_by_one(self) -> Codec:
        return self

    def for_kernels(
        self, codes: Shaped[Array, "B K R c"], numbers: tuple[Array, ...], role: Role, *tables: Array
    ) -> Coded | None:
        least, step = numbers
        return Coded(codes, least, step, self.bits, math.gcd(codes.shape[2], LISTED), "token")

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Array) -> Codes:
        return by_token(x, self.bits, self.group, self.fit)

    def decode(self, codes: Codes, role: Role, *tables: Array) -> Float[Array, "B K N G D"]:
        return dequantised(codes)


def run_of_channels(width: int, most: int) -> int:
    """The largest part of a head, `most` at most, that divides it."""
    return next(size for size in range(min(most, width), 0, -1) if width % size == 0)


def by_token(x: Float[Array, "B K N G D"], bits: int, group: int, fit: Fit = "range") -> Codes:
    """Codes of each token by itself, `group` channels at a time."""
    parts = x.reshape(*x.shape[:-1], -1, run_of_channels(x.shape[-1], group))
    codes, numbers = quantised(parts, bits, axis=-1, fit=fit)
    return codes.reshape(x.shape), tuple(y[..., 0] for y in numbers)


def quantised(x: Float[Array, "..."], bits: int, axis: int, fit: Fit = "range") -> tuple[Array, tuple[Array, Array]]:
    """Codes, and the least and the step of all numbers along an axis.

    Both are rounded so that least and least + step * (2^bits - 1) still lie around what they are to reach.
    """
    x = x.astype(jnp.float32)
    low, high = (end(x, axis=axis, keepdims=True) for end in (jnp.min, jnp.max))
    found = _between(x, low, high, bits)
    if fit == "error":
        # Errors are compared as whole numbers, whose sum no order of additions changes.
        unit = ERROR_UNITS / jnp.where(high > low, high - low, 1)
        best = _error(x, found, unit, axis)
        for part in PARTS:
            cut = (high - low) * ((1 - part) / 2)
            other = _between(x, low + cut, high - cut, bits)
            error = _error(x, other, unit, axis)
            better = error < best
            best, found = jnp.where(better, error, best), jax.tree.map(partial(jnp.where, better), other, found)
    codes, least, step = found
    return codes.astype(jnp.uint8), (least.astype(jnp.bfloat16), step.astype(jnp.bfloat16))


def _between(x: Array, low: Array, high: Array, bits: int) -> tuple[Array, Array, Array]:
    """Codes from one number to another: codes, least and step, all float32."""
    most = 2**bits - 1
    least = rounded_down(low)
    step = -rounded_down(-(high - least) / most)
    return jnp.clip(jnp.round((x - least) / jnp.where(step > 0, step, 1)), 0, most), least, step


def _error(x: Array, found: tuple[Array, Array, Array], unit: Array, axis: int) -> Array:
    codes, least, step = found
    error = jnp.round((least + step * codes - x) * unit).astype(jnp.int32)
    return jnp.sum(error * error, axis=axis, keepdims=True)


def dequantised(codes: Codes) -> Float[Array, "B K N G D"]:
    """The numbers that codes stand for. A step times a code is exact in float32."""
    whole, (least, step) = codes
    width = whole.shape[-1] // least.shape[-1]  # channels that share a least and a step
    parts = whole if width == 1 else whole.reshape(*whole.shape[:-1], -1, width)
    least, step = (y.astype(jnp.float32) if width == 1 else y.astype(jnp.float32)[..., None] for y in (least, step))
    return (least + step * parts.astype(jnp.float32)).reshape(whole.shape)


def rounded_down(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The greatest bfloat16 numbers that are not above these float32 numbers, as float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    away = jnp.where(x < 0, jnp.uint32(0xFFFF), jnp.uint32(0))
    return jax.lax.bitcast_convert_type((bits + away) & jnp.uint32(_HIGH_HALF), jnp.float32)
