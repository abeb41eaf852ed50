"""What stands where a buffer of keys or values stands, and holds codes: the interface, and how attention reads it.

Codes are decoded some slots at a time, plane by plane, as they are read: what is decoded stays in the cache, and codes
that share bytes are never laid out beside each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32

from pallas_kernels.coded import Coded
from pallas_kernels.partial import Partial, merge
from pallas_kernels.unpacking.protocol import Unpackable
from streamjax.attention.rotary import Rotary
from streamjax.kv.codecs.codec import Codec, Codes, Role, shapes
from streamjax.kv.codecs.packing import plane_of

Slots = Any  # an array of keys or values [B, K, S, D], or `CodedSlots`
AttendPart = Callable[[Array, Array, Array, Array], Partial]


class CodedSlots:
    """Slots of keys or of values, [B, K, S, D], as codes; subclasses are pytrees. `dtype` is what they decode to.

    Slots lie in `units`, of which any run can be decoded. A unit has `planes` runs of `width` slots, whose codes share
    bytes. Of a row's newest tokens some may wait in full precision, in `tail`.
    """

    codes: Shaped[Array, "B K R c"]
    numbers: tuple[Shaped[Array, "B K _ _"], ...]
    tables: tuple[Shaped[Array, "B K _ _"], ...]
    codec: Codec
    role: Role

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        raise NotImplementedError

    @property
    def units(self) -> int:
        raise NotImplementedError

    @property
    def width(self) -> int:
        raise NotImplementedError

    @property
    def planes(self) -> int:
        return 8 // self.codec.bits

    def side(self, x: Shaped[Array, "*B S"], start: Array, units: int, plane: int) -> Shaped[Array, "*B m"]:
        """Of an array with one entry a slot, those of one plane of some units."""
        raise NotImplementedError

    def part(self, start: Array, units: int, plane: int) -> Float[Array, "B K m D"]:
        """The same of what the slots hold."""
        raise NotImplementedError

    def write(self, chunk: Float[Array, "B K C D"], start: Int32[Array, " B"], count: Int32[Array, " B"]) -> Any:
        """With a run of a chunk, `count` tokens from `start` on, behind the newest token."""
        raise NotImplementedError

    def read_run(self, first: Int32[Array, " B"], width: int) -> Float[Array, "B K n D"]:
        """The slots from `first` on that do not wait, decoded; they wrap."""
        raise NotImplementedError

    def coded(self) -> Bool[Array, "B 1 S"] | None:
        """Which slots do not wait; None where none does."""
        return None

    def settled_only(self, valid: Bool[Array, "B N S"]) -> Bool[Array, "B N S"]:
        """Of these slots those that do not wait."""
        coded = self.coded()
        return valid if coded is None else valid & coded

    def unaltered(self) -> Int32[Array, " B"] | int:
        """How many tokens can be written before one that is there, or one of them, becomes a code."""
        return 0

    def waiting(self) -> tuple[Float[Array, "B K T D"], Int32[Array, "B T"], Bool[Array, "B T"]] | None:
        """What waits: keys or values, the slots that they will have, and which of them are there."""
        return None

    def for_kernels(
        self, position: UInt32[Array, "B #K S"] | None = None, rotary: Rotary | None = None
    ) -> Coded | Unpackable | None:
        """All slots as the decoding kernels read them, waiting ones unlike what they hold; None where they do not.

        position: of each slot, to which unrotated keys are turned by `rotary`.
        """
        found = self.codec.for_kernels(self.codes, self.numbers, self.role, *self.tables)
        if found is None or rotary is None or not self.codec.unrotated or self.role != "k":
            return found
        return None if position is None else self.codec.turned(found, position, rotary.steps)

    def gathered(self, pages: Int32[Array, "B K N"], size: int) -> CodedSlots:
        """The slots of these pages of `size` of each head, which are no ring; nothing waits there."""
        raise NotImplementedError

    def decoded_run(self, first: Int32[Array, " B"], width: int) -> Float[Array, "B K n D"]:
        """The slots from `first` on, decoded or as they wait; they wrap."""
        raise NotImplementedError

    def dense(self) -> Float[Array, "B K S D"]:
        """All slots, decoded."""
        whole = jnp.zeros((*self.shape[:2], self.planes, self.units, self.width, self.shape[3]), self.dtype)
        for plane in range(self.planes):
            part = self.part(jnp.int32(0), self.units, plane)
            whole = whole.at[:, :, plane].set(part.reshape(*whole.shape[:2], *whole.shape[3:]))
        return self._in_order(whole)

    def _in_order(self, planes: Float[Array, "B K p u w D"]) -> Float[Array, "B K S D"]:
        raise NotImplementedError

    def decoded(self, codes: Codes, dtype: DTypeLike | None = None) -> Float[Array, "B K N G D"]:
        return self.codec.decode(codes, self.role, *self.tables).astype(dtype or self.dtype)

    def encoded(self, groups: Float[Array, "B K N G D"]) -> Codes:
        return self.codec.encode(groups, self.role, *self.tables)

    def _plane(self, codes: Array, plane: int) -> Array:
        return plane_of(codes, self.codec.bits, plane)


def dense(x: Any) -> Float[Array, "B K S D"]:
    """A buffer of keys or values as an array, whatever it lies in."""
    return x.dense() if isinstance(x, CodedSlots) else x


def turned(
    slots: Slots, k: Float[Array, "B K S D"], position: UInt32[Array, "B #K S"], rotary: Rotary | None
) -> Float[Array, "B K S D"]:
    """Keys that lay in these slots at their positions, which codes of unrotated keys are not."""
    if rotary is None or not isinstance(slots, CodedSlots) or not slots.codec.unrotated:
        return k
    return rotary.moved(k, position)


def unaltered(slots: Slots) -> Int32[Array, " B"] | int:
    """How many tokens can be written before queries read one otherwise than it was written; see `Tier.unaltered`."""
    return slots.unaltered() if isinstance(slots, CodedSlots) else 0


def require_rotated(tier: object, codec: Codec) -> None:
    """Raise a ValueError where a codec wants keys as they were before rotation, which this tier does not turn."""
    if codec.unrotated:
        raise ValueError(f"{type(tier).__name__}.codec: {codec!r} codes unrotated keys, which Full and Window store")


def page_rows(x: Shaped[Array, "B K R c"], pages: Int32[Array, "B K N"], count: int) -> Shaped[Array, "B K r c"]:
    """The rows of chosen pages, of which there are `count`."""
    cut = x.reshape(*x.shape[:2], count, -1, x.shape[3])
    found = jnp.take_along_axis(cut, pages[..., None, None], axis=2, mode="clip")
    return found.reshape(*x.shape[:2], -1, x.shape[3])


def empty_arrays(
    codec: Codec, role: Role, rows: int, heads: int, groups: int, channels: int, dtype: DTypeLike = jnp.float32
) -> tuple[Array, tuple[Array, ...]]:
    """Codes and numbers of so many groups of tokens of this dtype, all zero."""
    one, numbers = shapes(codec, role, channels, dtype)
    places = -(-groups * one.shape[3] * codec.bits // 8)
    codes = jnp.zeros((rows, heads, places, one.shape[4]), one.dtype)
    return codes, tuple(jnp.zeros((rows, heads, groups * x.shape[3], x.shape[4]), x.dtype) for x in numbers)


def attend_coded(
    attend: AttendPart,
    k: CodedSlots,
    v: CodedSlots | Array,
    position: UInt32[Array, "B #K S"],
    valid: Bool[Array, "B #K *C S"],
    nothing: Partial,
    used: Array | int,
    together: int,
) -> Partial:
    """Attention to coded slots, of which the first `used` hold tokens: `attend` of `together` at a time, merged."""
    waits = k.waiting()
    if waits is not None:
        keys, slots, there = waits
        values = v.waiting()[0] if isinstance(v, CodedSlots) else v[:, :, : keys.shape[2]]  # type: ignore[index]
        nothing = merge(
            nothing, attend(keys, values, at_slots(position, slots), at_slots(valid, slots) & there[:, None])
        )
        valid = k.settled_only(valid)

    def block(part: Partial, start: Array, units: int, fresh: Array) -> Partial:
        for plane in range(k.planes):
            keys = k.part(start, units, plane)
            values = v.part(start, units, plane) if isinstance(v, CodedSlots) else v[:, :, : keys.shape[2]]
            where, some = (k.side(x, start, units, plane) for x in (position, valid))
            part = merge(part, attend(keys, values, where, some & fresh))
        return part

    return over_blocks(k, block, nothing, used, together)


def mass_coded(
    fold: Callable[[Array, Array, Array], Float[Array, "B M m"]],
    k: CodedSlots,
    position: UInt32[Array, "B #K S"],
    valid: Bool[Array, "B #K S"],
    used: Array | int,
    together: int,
) -> Float[Array, "B M S"]:
    """What `fold` makes of keys, positions and which of them count, for each coded slot."""
    size = k.shape[2]
    number = jnp.arange(1, size + 1)[None, None]
    waits = k.waiting()
    valid = k.settled_only(valid)

    def block(masses: Array, start: Array, units: int, fresh: Array) -> Array:
        for plane in range(k.planes):
            found = fold(k.part(start, units, plane), *(k.side(x, start, units, plane) for x in (position, valid)))
            slots = k.side(number, start, units, plane)[0, 0] - 1
            masses = masses.at[:, :, jnp.where(slots < 0, size, slots)].set(found.astype(masses.dtype), mode="drop")
        return masses

    one = jax.eval_shape(
        lambda: fold(
            k.part(jnp.int32(0), k.units, 0), *(k.side(x, jnp.int32(0), k.units, 0) for x in (position, valid))
        )
    )
    masses = over_blocks(k, block, jnp.zeros((*one.shape[:2], size), jnp.float32), used, together)
    if waits is None:
        return masses
    keys, slots, there = waits
    found = fold(keys, at_slots(position, slots), at_slots(valid, slots) & there[:, None])
    slots = jnp.where(there, slots, size)
    return jax.vmap(lambda row, at, new: row.at[:, at].set(new, mode="drop"))(masses, slots, found.astype(masses.dtype))


def over_blocks(
    k: CodedSlots, block: Callable[[Any, Array, int, Array], Any], carry: Any, used: Array | int, together: int
) -> Any:
    """`carry = block(carry, first unit, units, which slots are new)` over all units that hold tokens."""
    units = min(k.units, max(1, together // (k.width * k.planes)))
    held = jnp.minimum(_units(k, used), k.units)

    def turn(index: Array, carry: Any) -> Any:
        start = jnp.minimum(index * units, k.units - units)  # the last ones are moved back to fit
        fresh = jnp.repeat(start + jnp.arange(units) >= index * units, k.width)
        return block(carry, start, units, fresh)

    return jax.lax.fori_loop(0, (held + units - 1) // units, turn, carry)


def _units(k: CodedSlots, used: Array | int) -> Array:
    """Units that hold tokens where the first `used` slots do."""
    return jnp.asarray((used + k.codec.tokens - 1) // k.codec.tokens)


def at_slots(x: Shaped[Array, "B N S"], slots: Int32[Array, "B T"]) -> Shaped[Array, "B N T"]:
    """Of an array with one entry a slot, those of some slots of each row."""
    return jnp.take_along_axis(x, jnp.broadcast_to(slots[:, None], (*x.shape[:2], slots.shape[1])), axis=2)
