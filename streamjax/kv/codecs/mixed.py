"""`Mixed`: keys in 2 bits where channels vary most and in 1 elsewhere, values in 1.58 (VidKV, arXiv 2503.16257)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from pallas_kernels.unpacking.digits import DigitUnpacking
from pallas_kernels.unpacking.protocol import Unpackable
from streamjax.field_checks import Count, Fraction, Size, check_fields
from streamjax.kv.codecs.codec import Codes, GroupedCodec, Role
from streamjax.kv.codecs.integers import dequantised, quantised

TRITS = 5  # codes of -1, 0 or 1 in a byte
_UNITS = 2**11  # of the largest number: sums of 512 such parts fit 32 bits


@dataclasses.dataclass(frozen=True)
class Mixed(GroupedCodec):
    """Fewer than two bits a number. What share bytes are channels of one token.

    Of a group's key channels the share `wide`, those whose numbers reach furthest apart, have 2 bits between the least
    and the greatest, channel by channel. The others are transformed across channels, to sines and cosines, and keep a
    sign each: `+-` the mean size of that coefficient in the group. Values have -1, 0 or 1 times the mean size of their
    channel in the group, 0 below half of it; five of them share a byte. Published sizes are the same; its transform is
    complex, and keeps two signs for each channel where a real one keeps one.

    The signs of coefficients near 0 are the compiler's; all else is exact. Decoding kernels read these codes in heads
    of 128 channels on TPUs, and in groups of a multiple of 16 tokens on GPUs.

    Args:
      group: tokens that are coded together.
      residual: newest tokens in full precision, a multiple of `group`.
      wide: the share of key channels in 2 bits.
      transform: whether channels in 1 bit are transformed.

    Raises:
      ValueError: a residual that is no multiple of the group.
    """

    group: Size = 32
    residual: Count = 0
    wide: Fraction = 0.5
    transform: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.residual % self.group:
            raise ValueError(f"Mixed.residual must be a multiple of the group of {self.group}, got {self.residual}")

    def check(self, head_dim: int) -> None:
        if head_dim > 256:
            raise ValueError(f"{self!r} numbers at most 256 channels, and heads have {head_dim}")

    def for_kernels(
        self, codes: Shaped[Array, "B K R c"], numbers: tuple[Array, ...], role: Role, *tables: Array
    ) -> Unpackable:
        width = numbers[-1].shape[3]
        if role == "v":
            return Unpackable(codes, {"size": numbers[0]}, DigitUnpacking(width, self.group, trits=True))
        wide, basis = self._wide(width), np.eye(width, dtype=np.float32)
        if self.transform and wide < width:
            basis[wide:, wide:] = waves(width - wide)
        *given, back = numbers
        names = [*(["least", "step"] if wide else []), *(["size"] if wide < width else [])]
        named = dict(zip(names, given, strict=True)) | {"back": back, "basis": jnp.asarray(basis)[None, None]}
        return Unpackable(codes, named, DigitUnpacking(width, self.group, wide, mixed=True))

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Array) -> Codes:
        x = x.astype(jnp.float32)
        if role == "v":
            size = _mean_size(x)
            whole = jnp.where(jnp.abs(x) > 0.5 * size, jnp.sign(x), 0.0) + 1
            return joined(whole.astype(jnp.uint8), 3, TRITS), (size.astype(jnp.bfloat16),)
        wide, width = self._wide(x.shape[-1]), x.shape[-1]
        spread = jnp.max(x, axis=3, keepdims=True) - jnp.min(x, axis=3, keepdims=True)
        place = jnp.argsort(jnp.argsort(-spread, axis=-1, stable=True), axis=-1)
        order = jnp.argsort(place >= wide, axis=-1, stable=True)  # wide ones first, both in their own order
        parts = jnp.take_along_axis(x, order, axis=-1)
        codes, numbers = quantised(parts[..., :wide], 2, axis=3) if wide else (parts[..., :0].astype(jnp.uint8), ())
        narrow, back = parts[..., wide:], jnp.argsort(order, axis=-1).astype(jnp.uint8)
        if width == wide:
            return joined(codes, 4, 4), (*numbers, back)
        if self.transform:
            narrow = jnp.einsum("bkngd,de->bknge", narrow, waves(width - wide), precision="highest")
        size = _mean_size(narrow)
        signs = joined((narrow >= 0).astype(jnp.uint8), 2, 8)
        return jnp.concatenate((joined(codes, 4, 4), signs), axis=-1), (*numbers, size.astype(jnp.bfloat16), back)

    def decode(self, codes: Codes, role: Role, *tables: Array) -> Float[Array, "B K N G D"]:
        whole, numbers = codes
        if role == "v":
            size = numbers[0].astype(jnp.float32)
            return (split(whole, 3, TRITS, size.shape[-1]).astype(jnp.float32) - 1) * size
        *given, back = numbers
        wide = self._wide(back.shape[-1])
        narrow, split_at, found = back.shape[-1] - wide, -(-wide // 4), []
        if wide:
            found.append(dequantised((split(whole[..., :split_at], 4, 4, wide), tuple(given[:2]))))
        if narrow:
            signs = split(whole[..., split_at:], 2, 8, narrow).astype(jnp.float32)
            rest = (2 * signs - 1) * given[-1].astype(jnp.float32)
            if self.transform:
                rest = jnp.einsum("bknge,de->bkngd", rest, waves(narrow), precision="highest")
            found.append(rest)
        return jnp.take_along_axis(jnp.concatenate(found, axis=-1), back.astype(jnp.int32), axis=-1)

    def _wide(self, width: int) -> int:
        return round(self.wide * width)


def joined(codes: UInt8[Array, "... D"], base: int, count: int) -> UInt8[Array, "... c"]:
    """Digits below `base` of D channels, `count` in a byte: plane by plane, channel i beside channel i + c."""
    places = -(-codes.shape[-1] // count)
    padded = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, places * count - codes.shape[-1])])
    whole = jnp.zeros((*codes.shape[:-1], places), jnp.uint8)
    for digit in range(count):
        whole = whole + padded[..., digit * places : (digit + 1) * places] * jnp.uint8(base**digit)
    return whole


def split(whole: UInt8[Array, "... c"], base: int, count: int, width: int) -> UInt8[Array, "... D"]:
    """The digits of so many channels."""
    digits = [whole // jnp.uint8(base**digit) % jnp.uint8(base) for digit in range(count)]
    return jnp.concatenate(digits, axis=-1)[..., :width]


def waves(width: int) -> Float[np.ndarray, "D D"]:
    """An orthonormal basis of sines and cosines, one a column: cos + sin of each frequency (Hartley)."""
    angle = 2 * np.pi * np.outer(np.arange(width), np.arange(width)) / width
    return ((np.cos(angle) + np.sin(angle)) / np.sqrt(width)).astype(np.float32)


def _mean_size(x: Float[Array, "B K N G D"]) -> Float[Array, "B K N 1 D"]:
    """The mean size of each channel's numbers in a group, from a sum of whole numbers, which no order changes."""
    most = jnp.max(jnp.abs(x), axis=3, keepdims=True)
    unit = jnp.where(most > 0, most, 1) / _UNITS
    total = jnp.sum(jnp.round(jnp.abs(x) / unit).astype(jnp.int32), axis=3, keepdims=True)
    return total.astype(jnp.float32) / x.shape[3] * unit
