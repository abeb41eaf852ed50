"""Keys or values in whole numbers of few bits, as the decoding kernels read them: `Coded`."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt8

Along = Literal["channel", "token"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
    """Slots [B, K, S, D] whose numbers are `least + step * code` (KIVI, 2402.02750).

    Slots lie in groups of `group`. A group's codes fill `group * bits / 8` rows of bytes: with 4 bits slot i of a group
    has the lower half of a byte of row i, and slot i + group / 2 the upper half.

    codes: of all groups. least, step: along "channel" one of each channel for the slots of a group, [B, K, S / group,
    D]; along "token" one of each slot for each of E runs of channels, [B, K, S, E].
    """

    codes: UInt8[Array, "B K R D"]
    least: Shaped[Array, "B K _ _"]
    step: Shaped[Array, "B K _ _"]
    bits: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    along: Along = dataclasses.field(metadata={"static": True})

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

    def widened(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "B K S D"]:
        """The numbers, all of them in memory: what the kernels never make."""
        batch, heads, slots, width = self.shape
        codes = self.codes.reshape(batch, heads, -1, 1, self.rows, width)
        shift = (self.bits * jnp.arange(self.planes, dtype=jnp.uint8))[:, None, None]
        numbers = ((codes >> shift) & jnp.uint8(2**self.bits - 1)).reshape(batch, heads, slots, width)
        least, step = (self._of_each(x.astype(dtype)) for x in (self.least, self.step))
        return least + step * numbers.astype(dtype)

    def _of_each(self, x: Float[Array, "B K _ _"]) -> Float[Array, "B K S #D"]:
        if self.along == "channel":
            return jnp.repeat(x, self.group, axis=2)
        return jnp.repeat(x, self.shape[3] // x.shape[3], axis=3)
