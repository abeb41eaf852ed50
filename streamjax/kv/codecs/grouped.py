"""`GroupedSlots`: tokens in successive slots, coded in groups; what fills no group yet waits in full precision.

A token waits in a tail of T slots, T being the tokens of a group and those that always wait. With its last slot taken,
the oldest group of the tail is coded into its slots. So what is stored depends on a row's tokens alone, however they
were cut into chunks. With groups of 4, a row that has read 10 tokens has coded 8, and 2 wait.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped

from streamjax.kv.codecs.codec import Codec, Codes, Role
from streamjax.kv.codecs.packing import packed
from streamjax.kv.codecs.slots import CodedSlots, empty_arrays, page_rows
from streamjax.kv.slots.ring_buffer import read_ring, write_ring


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedSlots(CodedSlots):
    """A ring of slots, or a line of them where nothing is written beyond the last.

    codes, numbers: of all groups, those of a group in a row. tail: the newest tokens in a ring. cursor: the slot of the
    next token. place: its slot in the tail. count: tokens that wait. waits: whether any may (static). tables: of the
    codec.
    """

    codes: Shaped[Array, "B K R c"]
    numbers: tuple[Shaped[Array, "B K _ _"], ...]
    tail: Float[Array, "B K T D"]
    cursor: Int32[Array, " B"]
    place: Int32[Array, " B"]
    count: Int32[Array, " B"]
    codec: Codec = dataclasses.field(metadata={"static": True})
    role: Role = dataclasses.field(metadata={"static": True})
    waits: bool = dataclasses.field(default=True, metadata={"static": True})
    tables: tuple[Shaped[Array, "B K _ _"], ...] = ()

    @classmethod
    def empty(cls, codec: Codec, role: Role, zeros: Float[Array, "B K S D"]) -> GroupedSlots:
        """Slots like those of this buffer, rounded up to whole groups."""
        rows, heads, slots, channels = zeros.shape
        arrays = empty_arrays(codec, role, rows, heads, -(-slots // codec.tokens), channels, zeros.dtype)
        tail = jnp.zeros((rows, heads, codec.tokens + codec.waiting, channels), zeros.dtype)
        counter = jnp.zeros((rows,), jnp.int32)
        return cls(*arrays, tail, counter, counter, counter, codec, role)

    @property
    def shape(self) -> tuple[int, ...]:
        rows, heads, _, channels = self.tail.shape
        return rows, heads, self.units * self.codec.tokens, channels

    @property
    def dtype(self) -> Any:
        return self.tail.dtype

    @property
    def units(self) -> int:
        return self.codes.shape[2] * self.planes // self.codec.tokens

    @property
    def width(self) -> int:
        return self.codec.tokens // self.planes

    def unaltered(self) -> Int32[Array, " B"]:
        return self.codec.tokens + self.codec.waiting - 1 - self.count

    def write(
        self, chunk: Float[Array, "B K C D"], start: Int32[Array, " B"], count: Int32[Array, " B"]
    ) -> GroupedSlots:
        """With a run of a chunk behind the newest token; see `ring_buffer.write_ring`."""
        size, length = self.codec.tokens, self.tail.shape[2]
        tail = write_ring(self.tail, chunk, self.place, start, count, axis=2)
        place, waits = (self.place + count) % length, self.count + count
        oldest = (self.cursor - self.count) % self.shape[2] // size
        closed = jnp.maximum(waits - self.codec.waiting, 0) // size
        coded: Codes = (self.codes, self.numbers)
        if chunk.shape[2] == 1:

            def encode(tail: Array) -> Codes:
                return self._packed(read_ring(tail, place, size, axis=2)[:, :, None])

            def in_branch(coded: Codes, tail: Array) -> Codes:
                full = (closed > 0).any()
                return jax.lax.cond(full, lambda: self._put(coded, encode(tail), oldest, closed), lambda: coded)

            def behind_branch(coded: Codes, tail: Array) -> Codes:
                shapes = jax.eval_shape(encode, tail)
                nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
                fresh = jax.lax.cond((closed > 0).any(), lambda: encode(tail), lambda: nothing)
                return self._put(coded, fresh, oldest, closed)

            # A CPU copies all codes at every token if they are written behind the branch, a GPU if within.
            coded = jax.lax.platform_dependent(coded, tail, cpu=in_branch, default=behind_branch)
        else:
            groups = (length - 1 + chunk.shape[2] - self.codec.waiting) // size
            # What waited, and the run behind it.
            index = jnp.arange(groups * size, dtype=jnp.int32)[None]
            waited, before = index < self.count[:, None], self.count[:, None]
            own = jnp.clip(start[:, None] + index - before, 0, chunk.shape[2] - 1)
            old = (self.place[:, None] - before + index) % length
            line = jnp.where(
                waited[:, None, :, None], _gather_slots(self.tail, old), _gather_slots(chunk.astype(self.dtype), own)
            )
            line = line.reshape(*line.shape[:2], groups, size, -1)
            coded = self._put(coded, self._packed(line), oldest, closed)
        codes, numbers = coded
        return dataclasses.replace(
            self,
            codes=codes,
            numbers=numbers,
            tail=tail,
            cursor=(self.cursor + count) % self.shape[2],
            place=place,
            count=waits - closed * size,
        )

    def _packed(self, groups: Float[Array, "B K N G D"]) -> Codes:
        codes, numbers = self.encoded(groups)
        return packed(codes, self.codec.bits), numbers

    def _put(self, coded: Codes, fresh: Codes, unit: Int32[Array, " B"], count: Int32[Array, " B"]) -> Codes:
        """All codes and numbers, with those of the first `count` of some groups from `unit` on."""
        nothing = jnp.zeros_like(count)

        def put(whole: Array, new: Array) -> Array:
            cut = whole.reshape(*whole.shape[:2], self.units, -1, whole.shape[3])
            return write_ring(cut, new, unit, nothing, count, axis=2).reshape(whole.shape)

        return jax.tree.map(put, coded, fresh)

    def side(self, x: Shaped[Array, "*B S"], start: Array, units: int, plane: int) -> Shaped[Array, "*B m"]:
        run = jax.lax.dynamic_slice_in_dim(x, start * self.codec.tokens, units * self.codec.tokens, axis=-1)
        return run.reshape(*x.shape[:-1], units, self.planes, self.width)[..., plane, :].reshape(*x.shape[:-1], -1)

    def part(self, start: Array, units: int, plane: int) -> Float[Array, "B K m D"]:
        def run(x: Array) -> Array:
            rows = x.shape[2] // self.units
            some = jax.lax.dynamic_slice_in_dim(x, start * rows, units * rows, axis=2)
            return some.reshape(*x.shape[:2], units, rows, x.shape[3])

        found = self._decoded_plane(run(self.codes), tuple(map(run, self.numbers)), plane)
        return found.reshape(*found.shape[:2], -1, found.shape[-1])

    def _decoded_plane(
        self, codes: Shaped[Array, "B K N g c"], numbers: tuple[Array, ...], plane: int
    ) -> Float[Array, "B K N w D"]:
        """One plane of some groups, whose numbers are one for the group or one for each token."""
        of_plane = slice(plane * self.width, (plane + 1) * self.width)
        some = tuple(x if x.shape[3] < self.codec.tokens else x[:, :, :, of_plane] for x in numbers)
        return self.decoded((self._plane(codes, plane), some))

    def _in_order(self, planes: Float[Array, "B K p u w D"]) -> Float[Array, "B K S D"]:
        whole = jnp.moveaxis(planes, 2, 3).reshape(self.shape)
        waits = self.waiting()
        assert waits is not None
        tail, slots, there = waits
        slots = jnp.where(there, slots, self.shape[2])
        return jax.vmap(lambda row, at, new: row.at[:, at].set(new, mode="drop"))(whole, slots, tail)

    def _age(self, last: Int32[Array, " B"], count: int) -> Int32[Array, "B n"]:
        return (last[:, None] - 1 - jnp.arange(count, dtype=jnp.int32)) % count

    def coded(self) -> Bool[Array, "B 1 S"]:
        return (self._age(self.cursor, self.shape[2]) >= self.count[:, None])[:, None]

    def waiting(self) -> tuple[Float[Array, "B K T D"], Int32[Array, "B T"], Bool[Array, "B T"]] | None:
        if not self.waits:
            return None
        age = self._age(self.place, self.tail.shape[2])
        return self.tail, (self.cursor[:, None] - 1 - age) % self.shape[2], age < self.count[:, None]

    def read_run(self, first: Int32[Array, " B"], width: int) -> Float[Array, "B K n D"]:
        """The slots from `first` on that are coded, decoded; they wrap."""
        size = self.codec.tokens
        groups = (width + size - 2) // size + 1

        def run(x: Array) -> Array:
            cut = x.reshape(*x.shape[:2], self.units, -1, x.shape[3])
            return read_ring(cut, first // size, groups, axis=2)

        codes, numbers = run(self.codes), tuple(map(run, self.numbers))
        planes = [self._decoded_plane(codes, numbers, plane) for plane in range(self.planes)]
        line = jnp.concatenate(planes, axis=3).reshape(*self.shape[:2], groups * size, -1)
        return _gather_slots(line, first[:, None] % size + jnp.arange(width, dtype=jnp.int32))

    def decoded_run(self, first: Int32[Array, " B"], width: int) -> Float[Array, "B K n D"]:
        slots = (first[:, None] + jnp.arange(width, dtype=jnp.int32)) % self.shape[2]
        age = (self.cursor[:, None] - 1 - slots) % self.shape[2]
        tail = _gather_slots(self.tail, (self.place[:, None] - 1 - age) % self.tail.shape[2])
        return jnp.where((age < self.count[:, None])[:, None, :, None], tail, self.read_run(first, width))

    def gathered(self, pages: Int32[Array, "B K N"], size: int) -> GroupedSlots:
        count = self.shape[2] // size
        codes, *numbers = (page_rows(x, pages, count) for x in (self.codes, *self.numbers))
        return dataclasses.replace(self, codes=codes, numbers=tuple(numbers), waits=False)


def _gather_slots(x: Shaped[Array, "B K S D"], slots: Int32[Array, "B m"]) -> Shaped[Array, "B K m D"]:
    return jnp.take_along_axis(x, slots[:, None, :, None], axis=2, mode="clip")
