"""`BlockFloats`: numbers side by side with one exponent, channels of one size together (arXiv 2403.20137)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.coded import Coded, power
from streamjax.field_checks import Count, Size, check_fields
from streamjax.kv.codecs.codec import Codes, GroupedCodec, Role
from streamjax.kv.codecs.integers import run_of_channels


@dataclasses.dataclass(frozen=True)
class BlockFloats(GroupedCodec):
    """Of each token `block` channels share an exponent of 8 bits, and each has a mantissa of `bits`, sign included.

    A channel that is larger than its neighbours costs them their digits. So the channels of a group of tokens are first
    sorted by the largest number that they have in it, and like ones share an exponent; a byte for each says where it
    went. The published rule sorts once, by the rows of the keys' weights, and turns the queries' with them; here it is
    the stream's own keys and values that say it, for each group.

    Args:
      bits: of a mantissa.
      block: channels that share an exponent, or the largest smaller part of a head that divides it.
      group: tokens that share an order of channels.
      residual: newest tokens in full precision, a multiple of `group`.
      sort: whether channels are sorted.

    Raises:
      ValueError: a residual that is no multiple of the group, or one that does not fill bytes.
    """

    bits: Literal[8, 4, 2] = 4  # type: ignore[assignment]
    block: Size = 16
    group: Size = 64
    residual: Count = 0
    sort: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_groups()

    def check(self, head_dim: int) -> None:
        if head_dim > 256:
            raise ValueError(f"{self!r} sorts at most 256 channels, and heads have {head_dim}")

    def for_kernels(
        self, codes: Shaped[Array, "B K R c"], numbers: tuple[Array, ...], role: Role, *tables: Array
    ) -> Coded | None:
        exponent, *moved = numbers
        order = moved[0] if moved else None
        return Coded(codes, None, exponent, self.bits, self.group, "token", 2 ** (self.bits - 1), order=order)

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Array) -> Codes:
        x = x.astype(jnp.float32)
        moved: tuple[Array, ...] = ()
        if self.sort:
            order = jnp.argsort(-jnp.max(jnp.abs(x), axis=3, keepdims=True), axis=-1, stable=True)
            x = jnp.take_along_axis(x, order, axis=-1)
            moved = (jnp.argsort(order, axis=-1).astype(jnp.uint8),)
        blocks = x.reshape(*x.shape[:-1], -1, run_of_channels(x.shape[-1], self.block))
        largest = jnp.max(jnp.abs(blocks), axis=-1)
        exponent = jax.lax.bitcast_convert_type(largest, jnp.uint32) >> 23
        half = 2 ** (self.bits - 1)
        whole = jnp.clip(jnp.round(blocks / power(exponent, self.bits)[..., None]), -half, half - 1) + half
        return whole.astype(jnp.uint8).reshape(x.shape), (exponent.astype(jnp.uint8), *moved)

    def decode(self, codes: Codes, role: Role, *tables: Array) -> Float[Array, "B K N G D"]:
        whole, (exponent, *moved) = codes
        blocks = whole.reshape(*whole.shape[:-1], exponent.shape[-1], -1).astype(jnp.float32)
        found = (blocks - 2 ** (self.bits - 1)) * power(exponent, self.bits)[..., None]
        found = found.reshape(whole.shape)
        return jnp.take_along_axis(found, moved[0].astype(jnp.int32), axis=-1) if self.sort else found
