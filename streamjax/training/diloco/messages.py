"""What replicas send each other: how far parameters have moved, in 4 bits a number.

A number is a sign and three bits for a power of two (E3M0): 0, or the scale times 2^-6 to 2^0. The scale is the largest
magnitude among the numbers that share it, in bfloat16, sent as bits since some backends widen what they gather. What
arrives is summed in the dtype of the parameters.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt8, UInt16

Exchange = Literal["float32", "bfloat16", "e3m0"]
LEVELS = 7  # powers of two that three bits can say, besides zero


class Message(NamedTuple):
    """Numbers of one parameter. codes: uint8, each two of them along the last dimension; or the numbers themselves."""

    codes: Shaped[Array, "..."]
    scales: UInt16[Array, "..."] | None


def encode(x: Float[Array, "..."], exchange: Exchange, scaled: int) -> Message:
    """A message of `x`. scaled: the first dimensions of `x`, whose indices have scales of their own."""
    if exchange != "e3m0":
        return Message(x.astype(exchange), None)
    rest = tuple(range(scaled, x.ndim))
    scales = jnp.max(jnp.abs(x), axis=rest, keepdims=True).astype(jnp.bfloat16)
    wide, scales = scales.astype(x.dtype), jax.lax.bitcast_convert_type(scales, jnp.uint16)
    share = jnp.abs(x) / jnp.where(wide > 0, wide, 1)
    powers = 2.0 ** jnp.arange(1 - LEVELS, 1, dtype=x.dtype)  # 2^-6 to 2^0
    borders = powers * jnp.where(jnp.arange(LEVELS) > 0, 0.75, 0.5).astype(x.dtype)  # half way from the one below
    levels = jnp.zeros(x.shape, jnp.uint8)
    for border in borders:
        levels += (share >= border).astype(jnp.uint8)
    return Message(_packed(levels + 8 * (x < 0).astype(jnp.uint8)), scales)


def decode(message: Message, width: int, dtype: DTypeLike) -> Float[Array, "..."]:
    """The numbers of a message whose last dimension has `width` of them."""
    if message.scales is None:
        return message.codes.astype(dtype)
    codes = _unpacked(message.codes, width)
    level, negative = (codes % 8).astype(dtype), codes >= 8
    scales = jax.lax.bitcast_convert_type(message.scales, jnp.bfloat16)
    size = jnp.where(level > 0, 2.0 ** (level - LEVELS), 0) * scales.astype(dtype)
    return jnp.where(negative, -size, size).astype(dtype)


def _packed(codes: UInt8[Array, "... D"]) -> UInt8[Array, "... P"]:
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] + 16 * pairs[..., 1]


def _unpacked(codes: UInt8[Array, "... P"], width: int) -> UInt8[Array, "... D"]:
    pairs = jnp.stack((codes % 16, codes // 16), axis=-1)
    return pairs.reshape(*codes.shape[:-1], -1)[..., :width]
