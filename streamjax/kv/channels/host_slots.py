"""`HostSlots`: values that lie in the host's memory as they are, in pages, of which a token's queries fetch some."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from streamjax.kv.channels.bases import WholeSlots
from streamjax.kv.codecs.codec import Codec
from streamjax.kv.pages.host_memory import host_buffer, in_host_memory, run_of_pages, take_pages, write_run
from streamjax.kv.query import KVSpec
from streamjax.kv.slots.ring_buffer import write_linear, write_ring


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostSlots(WholeSlots):
    """`WholeSlots` whose slots are written token by token; what waits lies in the tail on the device as well.

    page: tokens that are fetched and put back together (static).
    """

    page: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def allocate(cls, spec: KVSpec, codec: Codec, slots: int, page: int) -> HostSlots:
        """Empty slots for `slots` values, rounded up to whole groups."""
        there = WholeSlots.empty(codec, "v", spec.values(slots))
        wide = dataclasses.replace(spec, head_dim=there.shape[3])
        codes = host_buffer(wide, there.shape[2])
        return cls(codes, there.numbers, there.tail, there.cursor, there.place, there.count, codec, "v", page=page)

    def write(self, chunk: Float[Array, "B K C D"], start: Int32[Array, " B"], count: Int32[Array, " B"]) -> HostSlots:
        if in_host_memory(self.codes):
            codes, _ = write_run(self.codes, chunk, self.cursor, start, count, self.page)
        else:
            codes = write_linear(self.codes, chunk, self.cursor, start, count, axis=2)
        waits = self.count + count
        closed = jnp.maximum(waits - self.codec.waiting, 0) // self.codec.tokens
        return dataclasses.replace(
            self,
            codes=codes,
            tail=write_ring(self.tail, chunk, self.place, start, count, axis=2),
            cursor=self.cursor + count,
            place=(self.place + count) % self.tail.shape[2],
            count=waits - closed * self.codec.tokens,
        )

    def part(self, start: Array, units: int, plane: int) -> Float[Array, "B K m D"]:
        if not in_host_memory(self.codes):
            return super().part(start, units, plane)
        first = jnp.full((self.codes.shape[0],), start * self.codec.tokens // self.page, jnp.int32)
        run = run_of_pages(self._pages(), first, units * self.codec.tokens // self.page)
        return rearrange(run, "b k n s d -> b k (n s) d")

    def fetched_pages(self, pages: Int32[Array, "B K N"]) -> Float[Array, "B K n D"]:
        """The values of the pages that each key head names, on the device."""
        return rearrange(take_pages(self._pages(), pages), "b k n s d -> b k (n s) d")

    def _pages(self) -> Float[Array, "B K P s D"]:
        return rearrange(self.codes, "b k (p s) d -> b k p s d", s=self.page)
