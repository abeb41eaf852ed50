"""`Full`: keep every token, up to a capacity. Alone it is ordinary attention with a growing cache."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels.partial import Partial
from streamjax.attention.context.exchange import AXIS
from streamjax.attention.context.merging import merge_over_devices
from streamjax.attention.rotary import Rotary
from streamjax.attention.sharded import Names, names_of_partial, per_device_call
from streamjax.field_checks import LATER, Size, check_fields
from streamjax.kv.codecs.codec import Codec
from streamjax.kv.codecs.slots import CodedSlots, Slots, dense, turned, unaltered
from streamjax.kv.codecs.stores import stores
from streamjax.kv.decode_kernels import decode, kernel_decodes
from streamjax.kv.query import KVSpec, KVTokens, Query, Stored
from streamjax.kv.slots.over_devices import (
    QUERY,
    on_several_devices,
    query_arrays,
    query_names,
    query_of,
    write_linear_over_devices,
)
from streamjax.kv.slots.ring_buffer import write_linear
from streamjax.kv.tier import Tier

_KEYS: Names = ("batch", "kv_heads", "slots", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearState:
    """Slots 0 .. filled - 1 of each row hold tokens, in order; N is 1, or the key heads where each has its own."""

    k: Slots
    v: Slots
    position: UInt32[Array, "B N S"]
    filled: Int32[Array, " B"]

    @property
    def valid(self) -> Bool[Array, "B 1 S"]:
        """Which slots hold tokens."""
        return jnp.arange(self.k.shape[2]) < self.filled[:, None, None]

    @classmethod
    def empty(cls, spec: KVSpec, slots: int, codec: Codec | None = None) -> LinearState:
        k, v = stores(spec.buffer(slots), spec.values(slots), codec)
        return cls(k, v, spec.positions(k.shape[2]), spec.counter())


def append(state: LinearState, tokens: KVTokens) -> tuple[LinearState, KVTokens]:
    """Append tokens while there is room; return those that found none."""
    start, count = tokens.run()
    slots = state.k.shape[2]
    taken = jnp.minimum(count, slots - state.filled)

    def write(buffer: Any, chunk: Array) -> Any:
        if on_several_devices(buffer):
            return write_linear_over_devices(buffer, chunk, state.filled, start, taken)
        if isinstance(buffer, CodedSlots):
            return buffer.write(chunk, start, taken)
        return write_linear(buffer, chunk, state.filled, start, taken, axis=2)

    index = jnp.arange(tokens.valid.shape[2], dtype=jnp.int32)[None, None]
    left = tokens.valid & (index >= (start + taken)[:, None, None])
    new = LinearState(
        write(state.k, tokens.k),
        write(state.v, tokens.v),
        write(state.position, tokens.position),
        state.filled + taken,
    )
    return new, dataclasses.replace(tokens, valid=left)


@dataclasses.dataclass(frozen=True)
class Full(Tier):
    """Keeps every token that reaches it, up to `capacity`, at its true distance. The last tier of its cascade.

    Tokens beyond the capacity are not stored; a stream's outputs are NaN from the first of them on (`advance`), never
    those of a silently truncated context. With a `codec` they are stored as codes.
    """

    shares_values: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = True
    last_because: ClassVar[str] = "nothing falls out of it"

    capacity: Size
    codec: Codec | None = dataclasses.field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def slots(self) -> int:
        return self.capacity

    @property
    def alters_every(self) -> int | None:
        return None if self.codec is None else self.codec.tokens

    def unaltered(self, state: LinearState) -> Int32[Array, " B"] | int:
        return unaltered(state.k)

    def init(self, spec: KVSpec) -> LinearState:
        return LinearState.empty(spec, self.capacity, self.codec)

    def stored(self, state: LinearState, rotary: Rotary | None) -> Stored:
        k = turned(state.k, dense(state.k), state.position, rotary)
        return Stored(k, dense(state.v), state.position, state.valid)

    def attend(self, state: LinearState, query: Query, reach: int | None) -> Partial:
        if on_several_devices(state.k):
            return _attend_over_devices(query, state.k, state.v, state.position, state.filled)
        if kernel_decodes(query, state.k, position=state.position):
            return decode(query, state.k, state.v, state.filled, position=state.position)
        return query.attend(state.k, state.v, state.position, state.valid, filled=state.filled)

    def insert(self, state: LinearState, tokens: KVTokens) -> tuple[LinearState, KVTokens]:
        unrotated = self.codec is not None and self.codec.unrotated
        return append(state, tokens.moved(back=True) if unrotated else tokens)


def _attend_over_devices(
    query: Query,
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S V"],
    position: UInt32[Array, "B N S"],
    filled: Int32[Array, " B"],
) -> Partial:
    """Attention to the first `filled` slots, of which each device reads its own: nobody has all of them.

    What devices exchange is as large as the queries.
    """

    def own(*arrays: Any) -> Partial:
        *of_query, k, v, position, filled = arrays
        size = k.shape[2]
        mine = jnp.clip(filled - jax.lax.axis_index(AXIS) * size, 0, size)
        here = query_of(query, *of_query)
        if kernel_decodes(here, k):
            return merge_over_devices(decode(here, k, v, mine))
        return merge_over_devices(here.attend(k, v, position, jnp.arange(size) < mine[:, None, None], filled=mine))

    heads = None if position.shape[1] == 1 else "kv_heads"
    names = (*query_names(query), _KEYS, _KEYS, ("batch", heads, "slots"), ("batch",))
    arrays = (*query_arrays(query), k, v, position, filled)
    return per_device_call(own, names, names_of_partial(QUERY), arrays)
