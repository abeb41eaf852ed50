"""`FireQ`: channels scaled to one size, the two of a rotated pair alike, then codes by token (arXiv 2505.20839)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.coded import Coded
from streamjax.field_checks import Count, Size, check_fields
from streamjax.kv.codecs.codec import Codes, GroupedCodec, Role
from streamjax.kv.codecs.integers import Bits, FewChannels, rounded_down, run_of_channels

_ONE = 128  # channels of a token that share a step


@dataclasses.dataclass(frozen=True)
class FireQ(GroupedCodec):
    """A number is `scale of its channel * step of its token * code`, codes being whole numbers around 0.

    Rotation turns the two channels d and d + D / 2 of a key into each other and leaves the length of the pair: both are
    scaled by the largest length that the pair has in a group of tokens, which is the same before and after rotation.
    The `top` channels of each head with the largest numbers after rotation, and those that they are paired with, are
    scaled by their own largest number instead. Values are not scaled. The published scales come from a text, once for
    a model, and divide the queries; here they are those of each group of tokens, 2 bytes a channel.

    Args:
      bits: of a code.
      group: tokens that share scales.
      residual: newest tokens in full precision, a multiple of `group`.
      top: channels of each head that have a scale of their own.

    Raises:
      ValueError: a residual that is no multiple of the group, or one that does not fill bytes.
    """

    bits: Bits = 4  # type: ignore[assignment]
    group: Size = 64
    residual: Count = 0
    top: FewChannels = 2

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_groups()
        if self.bits == 1:
            raise ValueError("FireQ.bits is 1: codes around 0 have 2 bits at least")

    def check(self, head_dim: int) -> None:
        if head_dim % 2 or head_dim < self.top:
            raise ValueError(f"{self!r} scales pairs of channels, {self.top} of them alone, and heads have {head_dim}")

    def for_kernels(
        self, codes: Shaped[Array, "B K R c"], numbers: tuple[Array, ...], role: Role, *tables: Array
    ) -> Coded | None:
        step, *scale = numbers
        stretch = scale[0] if scale else None
        return Coded(codes, None, step, self.bits, self.group, "token", 2 ** (self.bits - 1), stretch=stretch)

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Array) -> Codes:
        x = x.astype(jnp.float32)
        scale = self._scales(x) if role == "k" else None
        if scale is not None:
            x = x / scale.astype(jnp.float32)
        parts = x.reshape(*x.shape[:-1], -1, run_of_channels(x.shape[-1], _ONE))
        half = 2 ** (self.bits - 1)
        step = -rounded_down(-jnp.max(jnp.abs(parts), axis=-1, keepdims=True) / (half - 1))
        whole = jnp.clip(jnp.round(parts / jnp.where(step > 0, step, 1)), -half, half - 1) + half
        numbers = (step[..., 0].astype(jnp.bfloat16),)
        return whole.astype(jnp.uint8).reshape(x.shape), numbers if scale is None else (*numbers, scale)

    def decode(self, codes: Codes, role: Role, *tables: Array) -> Float[Array, "B K N G D"]:
        whole, (step, *scale) = codes
        parts = whole.reshape(*whole.shape[:-1], step.shape[-1], -1).astype(jnp.float32) - 2 ** (self.bits - 1)
        found = (parts * step.astype(jnp.float32)[..., None]).reshape(whole.shape)
        return found * scale[0].astype(jnp.float32) if scale else found

    def _scales(self, x: Float[Array, "B K N G D"]) -> Array:
        """A scale for each channel of a group, bfloat16; 1 where a channel is 0.

        Squares of bfloat16 numbers are exact, and so the length that they give is the same from every compiler.
        """
        half = x.shape[-1] // 2
        rough = x.astype(jnp.bfloat16).astype(jnp.float32)
        squares = jnp.max(rough[..., :half] ** 2 + rough[..., half:] ** 2, axis=3, keepdims=True)
        length = jnp.sqrt(squares.astype(jnp.bfloat16).astype(jnp.float32))
        scale = jnp.concatenate((length, length), axis=-1)
        if self.top:
            largest = jnp.max(jnp.abs(x), axis=3, keepdims=True)
            place = jnp.argsort(jnp.argsort(-largest, axis=-1, stable=True), axis=-1)
            alone = place < self.top
            scale = jnp.where(alone | jnp.roll(alone, half, axis=-1), largest, scale)
        scale = scale.astype(jnp.bfloat16)
        return jnp.where(scale > 0, scale, 1)
