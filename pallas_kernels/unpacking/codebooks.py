"""Channels side by side that are one entry of a codebook: a lookup for each (CQ, Zhang et al., arXiv 2405.03917).

Codes of keys stand for keys before rotation: these are turned here, by the positions of their slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, Shaped, UInt8, UInt32

from pallas_kernels.block_ranges import divide
from pallas_kernels.tpu.tiles import LANES, SUBLANES
from pallas_kernels.unpacking.protocol import Lies, Load, Unpackable, Unpacking
from pallas_kernels.unpacking.turning import cos_sin


@dataclasses.dataclass(frozen=True)
class CodebookUnpacking(Unpacking):
    """Numbers: `entries`, whole numbers of 16 bits, two channels in 32 bits (`entry_words`), and the `step` that they
    count, both for each run of `coupled` channels. With `turned`, `position` of each slot in 32 bits, and `turn`, how
    far a channel pair turns in a position, [R / coupled, coupled].

    bits: of a code. turned: channel pairs R that turn, (d, d + R).
    """

    coupled: int
    bits: int = 8
    turned: int = 0

    @property
    def lies(self) -> Mapping[str, Lies]:
        turning: dict[str, Lies] = {"position": "slot", "turn": "all"} if self.turned else {}
        return {"entries": "all", "step": "all", **turning}

    @property
    def runs(self) -> int:
        """Runs of channels, each of which has a code."""
        return self.width // self.coupled

    @property
    def order(self) -> tuple[int, ...] | None:
        return tuple(run * self.coupled + i for i in range(self.coupled) for run in range(self.runs))

    def refused_by(self, platform: Literal["tpu", "triton"]) -> str | None:
        if self.turned % self.coupled:
            return f"{self.coupled} channels with one code, of which not all turn"
        if platform == "tpu" and (self.runs % SUBLANES or self.turned // self.coupled % SUBLANES):
            return f"{self.runs} codes a slot"
        return None

    def plain(self, codes: UInt8[Array, "B K S P"], numbers: Mapping[str, Array]) -> Float[Array, "B K S D"]:
        found = looked_up(codes, numbers["entries"], self.bits, self.coupled).astype(jnp.float32)
        found = (found * numbers["step"][:, :, None]).reshape(*codes.shape[:3], self.width)
        if not self.turned:
            return found
        cos, sin = cos_sin(numbers["position"] * numbers["turn"].reshape(-1))
        first, second, rest = jnp.split(found, (self.turned, 2 * self.turned), axis=3)
        return jnp.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=3)

    def on_tpu(
        self, codes: Int[Array, "P slots"], numbers: Mapping[str, Shaped[Array, "_ _"]], dtype: DTypeLike
    ) -> Float[Array, "D slots"]:
        """Tables lie along lanes, a run's in a sublane of its own, and so does what is looked up: channel i of all
        runs, then channel i + 1."""
        channels: list[jax.Array] = []
        for table in jnp.split(numbers["entries"], -(-self.coupled // 2), axis=1):
            pair = _gathered(table, codes)
            low = lax.shift_right_arithmetic(lax.shift_left(pair, jnp.int32(16)), jnp.int32(16))
            channels += [low, lax.shift_right_arithmetic(pair, jnp.int32(16))]
        found = [x.astype(jnp.float32) * numbers["step"] for x in channels[: self.coupled]]
        half = self.turned // self.coupled
        if half:
            for i, x in enumerate(found):
                cos, sin = cos_sin(numbers["position"] * numbers["turn"][:, i : i + 1])
                first, second = x[:half], x[half : 2 * half]
                parts = [first * cos - second * sin, second * cos + first * sin]
                found[i] = jnp.concatenate([*parts, x[2 * half :]] if 2 * half < self.runs else parts, axis=0)
        return jnp.concatenate(found, axis=0)

    def on_gpu(self, load: Load, slot: Int[Array, " n"], channel: Int[Array, " d"], dtype: DTypeLike) -> Array:
        slot, channel = slot[:, None], channel[None]

        def value(channel: jax.Array) -> jax.Array:
            run = divide(channel, self.coupled)
            inside = channel - run * self.coupled
            word = load("entries", run, (lax.shift_right_logical(inside, 1) << self.bits) + load("codes", slot, run))
            low = lax.shift_right_arithmetic(lax.shift_left(word, jnp.int32(16)), jnp.int32(16))
            whole = jnp.where(inside & 1 == 0, low, lax.shift_right_arithmetic(word, jnp.int32(16)))
            return whole.astype(jnp.float32) * load("step", run, jnp.zeros_like(run))

        found = value(channel)
        if not self.turned:
            return found
        pairs = self.turned
        first = channel < pairs
        other = jnp.where(first, channel + pairs, channel - pairs)
        pair = jnp.minimum(channel, other)
        row = divide(pair, self.coupled)
        turn = load("turn", row, pair - row * self.coupled)
        cos, sin = cos_sin(load("position", slot, jnp.zeros_like(channel)) * turn)
        beside = value(jnp.where(channel < 2 * pairs, other, channel))
        turned = found * cos + jnp.where(first, -1.0, 1.0) * beside * sin
        return jnp.where(channel < 2 * pairs, turned, found)


def turned_keys(keys: Unpackable, position: UInt32[Array, "B #K S"], steps: tuple[int, ...]) -> Unpackable:
    """Keys before rotation that are turned to their positions: pair d by `position * steps[d]` 2^32ths of a turn."""
    unpacking = keys.unpacking
    assert isinstance(unpacking, CodebookUnpacking)
    coupled = unpacking.coupled if len(steps) % unpacking.coupled == 0 else 1  # else `refused_by` kernels
    turn = np.array(steps, np.uint32).view(np.int32).reshape(1, 1, -1, coupled)
    signed = lax.bitcast_convert_type(position, jnp.int32)[..., None]
    numbers = {**keys.numbers, "position": signed, "turn": jnp.asarray(turn)}
    return Unpackable(keys.codes, numbers, dataclasses.replace(unpacking, turned=len(steps)))


def entry_words(entries: Int[np.ndarray, "*N E c"]) -> Int32[np.ndarray, "*N _"]:
    """Whole numbers of 16 bits, of entry e those of channels 2w (below) and 2w + 1 at place w E + e."""
    pairs = np.pad(entries.astype(np.int32), [(0, 0)] * (entries.ndim - 1) + [(0, entries.shape[-1] % 2)])
    words = (pairs[..., 0::2] & 0xFFFF) | (pairs[..., 1::2] << 16)
    return np.swapaxes(words, -1, -2).reshape(*words.shape[:-2], -1)


def entries_of(words: Int32[Array, "*N _"], bits: int, coupled: int) -> Int32[Array, "*N E c"]:
    """What `entry_words` took."""
    pairs = jnp.swapaxes(words.reshape(*words.shape[:-1], -1, 2**bits), -1, -2)
    return _both(pairs)[..., :coupled]


def looked_up(
    codes: UInt8[Array, "*N S P"], words: Int32[Array, "*N P _"], bits: int, coupled: int
) -> Int32[Array, "*N S P c"]:
    """The entries that codes name."""
    size = words.shape[-1]
    place = (jnp.arange(codes.shape[-1], dtype=jnp.int32) * size)[:, None] + jnp.arange(0, size, 2**bits)
    index = codes.astype(jnp.int32)[..., None] + place
    flat = index.reshape(*index.shape[:-3], -1)
    found = jnp.take_along_axis(words.reshape(*words.shape[:-2], -1), flat, axis=-1, mode="promise_in_bounds")
    return _both(found.reshape(index.shape))[..., :coupled]


def _both(words: Int32[Array, "*N w"]) -> Int32[Array, "*N c"]:
    """The two numbers in each word, side by side."""
    low = jnp.right_shift(jnp.left_shift(words, 16), 16)
    return jnp.stack((low, jnp.right_shift(words, 16)), axis=-1).reshape(*words.shape[:-1], -1)


def _gathered(table: Int32[Array, "P E"], index: Int32[Array, "P slots"]) -> Int32[Array, "P slots"]:
    """Of each row the numbers at these places: a vector's lanes are looked up in a vector at a time."""
    slots, entries = index.shape[1], table.shape[1]
    if entries < LANES:
        table = jnp.concatenate([table] * (LANES // entries), axis=1)
    pieces = []
    for start in range(0, slots, LANES):
        some = index[:, start : start + LANES]
        inside = some & (LANES - 1)
        found = jnp.take_along_axis(table[:, :LANES], inside, axis=1, mode="promise_in_bounds")
        for low in range(LANES, entries, LANES):
            more = jnp.take_along_axis(table[:, low : low + LANES], inside, axis=1, mode="promise_in_bounds")
            found = jnp.where(some >= low, more, found)
        pieces.append(found)
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)
