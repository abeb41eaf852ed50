"""`FP8`: floating-point numbers of eight bits, each by itself."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from streamjax.kv.codecs.codec import Codec, Codes, Role

Kind = Literal["e4m3", "e5m2"]


@dataclasses.dataclass(frozen=True)
class FP8(Codec):
    """A byte a number, half of what bfloat16 takes, with no scale: numbers beyond the largest become the largest.

    Args:
      kind: "e4m3", three bits behind the point and numbers up to 448, or "e5m2", two bits and up to 57,344.
    """

    kind: Kind = "e4m3"

    def one_by_one(self) -> Codec:
        return self

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Array) -> Codes:
        dtype = _dtype(self.kind)
        most = float(jnp.finfo(dtype).max)
        rounded = jnp.clip(x.astype(jnp.float32), -most, most).astype(dtype)
        return jax.lax.bitcast_convert_type(rounded, jnp.uint8), ()

    def decode(self, codes: Codes, role: Role, *tables: Array) -> Float[Array, "B K N G D"]:
        return widened(codes[0], self.kind)


def widened(bits: UInt8[Array, "..."], kind: Kind) -> Float[Array, "..."]:
    """The floats that have these eight bits, as float32. Infinities, which are never stored, become NaN.

    XLA's CPU backend has no floats of eight bits: it would convert a whole buffer for every read or write of a few.
    """
    behind, bias, special = (3, 7, 0x7F) if kind == "e4m3" else (2, 15, 0x7C)
    wide = bits.astype(jnp.uint32)
    size = wide & 0x7F
    normal = jax.lax.bitcast_convert_type((size << (23 - behind)) + ((127 - bias) << 23), jnp.float32)
    small = size.astype(jnp.float32) * 2.0 ** (1 - bias - behind)
    found = jnp.where(size >> behind == 0, small, normal)
    found = jnp.where(size >= special, jnp.nan, found)
    return jnp.where(wide > size, -found, found)


def _dtype(kind: Kind) -> DTypeLike:
    return jnp.float8_e4m3fn if kind == "e4m3" else jnp.float8_e5m2
