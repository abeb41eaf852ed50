"""`FP8`: floating-point numbers of eight bits, each by itself."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from pallas_kernels.coded import Coded, float8
from streamjax.kv.codecs.codec import LISTED, Codec, Codes, Role

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

    def for_kernels(
        self, codes: Shaped[Array, "B K R c"], numbers: tuple[Array, ...], role: Role, *tables: Array
    ) -> Coded | None:
        return Coded(codes, None, None, 8, math.gcd(codes.shape[2], LISTED), "token", kind=self.kind)

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Array) -> Codes:
        dtype = _dtype(self.kind)
        most = float(jnp.finfo(dtype).max)
        rounded = jnp.clip(x.astype(jnp.float32), -most, most).astype(dtype)
        return jax.lax.bitcast_convert_type(rounded, jnp.uint8), ()

    def decode(self, codes: Codes, role: Role, *tables: Array) -> Float[Array, "B K N G D"]:
        return float8(codes[0], self.kind)


def _dtype(kind: Kind) -> DTypeLike:
    return jnp.float8_e4m3fn if kind == "e4m3" else jnp.float8_e5m2
