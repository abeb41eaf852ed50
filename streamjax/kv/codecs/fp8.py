"""`FP8`: floating-point numbers of eight bits, each by itself."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.kv.codecs.codec import Codec, Codes, Role


@dataclasses.dataclass(frozen=True)
class FP8(Codec):
    """A byte a number, half of what bfloat16 takes, with no scale: numbers beyond the largest become the largest.

    Args:
      kind: "e4m3", three bits behind the point and numbers up to 448, or "e5m2", two bits and up to 57,344.
    """

    kind: Literal["e4m3", "e5m2"] = "e4m3"

    def one_by_one(self) -> Codec:
        return self

    def encode(self, x: Float[Array, "B K N G D"], role: Role) -> Codes:
        dtype = jnp.float8_e4m3fn if self.kind == "e4m3" else jnp.float8_e5m2
        most = float(jnp.finfo(dtype).max)
        return jnp.clip(x.astype(jnp.float32), -most, most).astype(dtype), ()

    def decode(self, codes: Codes, role: Role) -> Float[Array, "B K N G D"]:
        return widened(codes[0])


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Floats of eight bits as float32, by their bits: XLA's CPU backend converts them one by one, many times slower.

    Infinities, which are never stored, become NaN.
    """
    behind, bias, special = (3, 7, 0x7F) if x.dtype == jnp.float8_e4m3fn else (2, 15, 0x7C)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.uint32)
    size = bits & 0x7F
    normal = jax.lax.bitcast_convert_type((size << (23 - behind)) + ((127 - bias) << 23), jnp.float32)
    small = size.astype(jnp.float32) * 2.0 ** (1 - bias - behind)
    found = jnp.where(size >> behind == 0, small, normal)
    found = jnp.where(size >= special, jnp.nan, found)
    return jnp.where(bits > size, -found, found)
