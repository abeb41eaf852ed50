"""`SlotwiseSlots`: tokens in any slots, each coded by itself. A token is written over another one at any time.

Where codes share bytes, slot i and slot i + S / 2 (or S / 4, ...) do: a write reads the byte first, plane by plane.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from pallas_kernels.coded import Coded
from pallas_kernels.unpacking.protocol import Unpackable
from streamjax.attention.rotary import Rotary
from streamjax.kv.codecs.codec import Codec, Codes, Role
from streamjax.kv.codecs.packing import with_plane
from streamjax.kv.codecs.slots import CodedSlots, empty_arrays, page_rows
from streamjax.kv.slots.ring_buffer import put_tokens, read_ring, write_ring


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotwiseSlots(CodedSlots):
    """codes, numbers: of all slots. cursor: the slot of the next token, where they are written in order. tables: of the
    codec."""

    codes: Shaped[Array, "B K R c"]
    numbers: tuple[Shaped[Array, "B K S _"], ...]
    cursor: Int32[Array, " B"]
    channels: int = dataclasses.field(metadata={"static": True})
    slots: int = dataclasses.field(metadata={"static": True})
    kind: np.dtype = dataclasses.field(metadata={"static": True})
    codec: Codec = dataclasses.field(metadata={"static": True})
    role: Role = dataclasses.field(metadata={"static": True})
    tables: tuple[Shaped[Array, "B K _ _"], ...] = ()

    @classmethod
    def empty(cls, codec: Codec, role: Role, zeros: Float[Array, "B K S D"]) -> SlotwiseSlots:
        """Slots like those of this buffer."""
        rows, heads, slots, channels = zeros.shape
        arrays = empty_arrays(codec, role, rows, heads, -(-slots * codec.bits // 8) * 8 // codec.bits, channels)
        return cls(*arrays, jnp.zeros((rows,), jnp.int32), channels, slots, np.dtype(zeros.dtype), codec, role)

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.codes.shape[:2], self.slots, self.channels

    @property
    def dtype(self) -> Any:
        return self.kind

    @property
    def units(self) -> int:
        return self.codes.shape[2]

    @property
    def width(self) -> int:
        return 1

    def _coded(self, chunk: Float[Array, "B K C D"]) -> tuple[Array, tuple[Array, ...]]:
        """Codes, not packed, and numbers of tokens."""
        codes, numbers = self.encoded(chunk[:, :, :, None].astype(self.dtype))
        return codes[:, :, :, 0], tuple(x[:, :, :, 0] for x in numbers)

    def put(self, chunk: Float[Array, "B K C D"], slots: Int32[Array, "B N C"]) -> SlotwiseSlots:
        """Token i of row b in slot `slots[b, n, i]`, nowhere where that is past the end."""
        fresh, numbers = self._coded(chunk)
        codes = self.codes
        if self.planes == 1:
            codes = put_tokens(codes, fresh, slots)
        else:
            wide = jnp.broadcast_to(slots, (*fresh.shape[:2], slots.shape[2]))
            for plane in range(self.planes):
                row = wide - plane * self.units
                here = (row >= 0) & (row < self.units) & (wide < self.slots)
                held = jnp.take_along_axis(codes, jnp.where(here, row, 0)[..., None], axis=2)
                new = with_plane(held, fresh, self.codec.bits, plane)
                codes = put_tokens(codes, new, jnp.where(here, row, self.units))
        past = jnp.where(slots < self.slots, slots, 2**30)
        numbers = tuple(put_tokens(x, new, past) for x, new in zip(self.numbers, numbers, strict=True))
        return dataclasses.replace(self, codes=codes, numbers=numbers)

    def for_kernels(
        self, position: UInt32[Array, "B #K S"] | None = None, rotary: Rotary | None = None
    ) -> Coded | Unpackable | None:
        return super().for_kernels(position, rotary) if self.planes == 1 else None

    def write(
        self, chunk: Float[Array, "B K C D"], start: Int32[Array, " B"], count: Int32[Array, " B"]
    ) -> SlotwiseSlots:
        """With a run of a chunk behind the newest token; see `ring_buffer.write_ring`."""
        if self.planes > 1:
            index = jnp.arange(chunk.shape[2], dtype=jnp.int32) - start[:, None]
            taken = (index >= 0) & (index < count[:, None]) & (index >= count[:, None] - self.slots)
            slot = jnp.where(taken, (self.cursor[:, None] + index) % self.slots, self.slots)
            new = self.put(chunk, slot[:, None])
        else:
            codes, numbers = self._coded(chunk)

            def put(whole: Array, new: Array) -> Array:
                return write_ring(whole, new, self.cursor, start, count, axis=2)

            numbers = tuple(put(whole, new) for whole, new in zip(self.numbers, numbers, strict=True))
            new = dataclasses.replace(self, codes=put(self.codes, codes), numbers=numbers)
        return dataclasses.replace(new, cursor=(self.cursor + count) % self.slots)

    def take(self, slots: Int32[Array, "B N M"]) -> Float[Array, "B K M D"]:
        """What lies in these slots."""
        wide = jnp.broadcast_to(slots, (*self.shape[:2], slots.shape[2]))[..., None]
        held = jnp.take_along_axis(self.codes, wide % self.units, axis=2, mode="clip")
        codes = held
        for plane in range(self.planes):
            codes = jnp.where(wide // self.units == plane, self._plane(held, plane), codes)
        return self._decoded((codes, tuple(jnp.take_along_axis(x, wide, axis=2, mode="clip") for x in self.numbers)))

    def read_run(self, first: Int32[Array, " B"], width: int) -> Float[Array, "B K n D"]:
        """The slots from `first` on, which wrap."""
        if self.planes > 1:
            return self.take((first[:, None] + jnp.arange(width, dtype=jnp.int32))[:, None] % self.slots)
        codes, *numbers = (read_ring(x, first, width, axis=2) for x in (self.codes, *self.numbers))
        return self._decoded((codes, tuple(numbers)))

    def decoded_run(self, first: Int32[Array, " B"], width: int) -> Float[Array, "B K n D"]:
        return self.read_run(first, width)

    def gathered(self, pages: Int32[Array, "B K N"], size: int) -> SlotwiseSlots:
        if self.planes > 1:
            raise ValueError(f"{self.codec!r} does not lie in pages")
        codes, *numbers = (page_rows(x, pages, self.slots // size) for x in (self.codes, *self.numbers))
        return dataclasses.replace(self, codes=codes, numbers=tuple(numbers), slots=codes.shape[2])

    def _decoded(self, codes: Codes) -> Float[Array, "B K n D"]:
        """Each slot is a group of one token."""
        whole, numbers = codes
        return self.decoded((whole[:, :, :, None], tuple(x[:, :, :, None] for x in numbers)))[:, :, :, 0]

    def side(self, x: Shaped[Array, "*B S"], start: Array, units: int, plane: int) -> Shaped[Array, "*B m"]:
        more = self.units * self.planes - x.shape[-1]
        whole = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])
        return jax.lax.dynamic_slice_in_dim(whole, plane * self.units + start, units, axis=-1)

    def part(self, start: Array, units: int, plane: int) -> Float[Array, "B K m D"]:
        codes = jax.lax.dynamic_slice_in_dim(self.codes, start, units, axis=2)
        numbers = (jax.lax.dynamic_slice_in_dim(x, plane * self.units + start, units, axis=2) for x in self.numbers)
        return self._decoded((self._plane(codes, plane), tuple(numbers)))

    def _in_order(self, planes: Float[Array, "B K p u w D"]) -> Float[Array, "B K S D"]:
        return planes.reshape(*self.shape[:2], -1, self.channels)[:, :, : self.slots]
