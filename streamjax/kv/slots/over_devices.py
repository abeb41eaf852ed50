"""Slots of which each device along the mesh axis `context` has an equal run: writing, reading and asking them.

Left to the compiler, a window of slots that may begin anywhere gathers them all. Here each device writes what falls to
its own slots, and reads what it has of what is asked for; what devices exchange is as large as that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from pallas_kernels.partial import accumulator
from streamjax.attention.context.exchange import AXIS, place
from streamjax.attention.sharded import Names, context_shards, per_device_call
from streamjax.kv.codecs.slots import CodedSlots, Slots
from streamjax.kv.query import Query
from streamjax.kv.slots.ring_buffer import write_linear

QUERY: Names = ("batch", None, "heads", None)
_ROWS: Names = ("batch",)


def on_several_devices(slots: Slots) -> bool:
    """Whether the mesh splits these slots, [B, K, S, ...], which are no codes."""
    return not isinstance(slots, CodedSlots) and context_shards(slots.shape[2]) > 1


def write_linear_over_devices(
    buffer: Shaped[Array, "B K S ..."],
    chunk: Shaped[Array, "B K C ..."],
    filled: Int32[Array, " B"],
    start: Int32[Array, " B"],
    count: Int32[Array, " B"],
) -> Shaped[Array, "B K S ..."]:
    """`write_linear` along the slots."""
    return _written(buffer, chunk, (filled, start, count))


def write_ring_over_devices(
    buffer: Shaped[Array, "B K S ..."],
    chunk: Shaped[Array, "B K C ..."],
    cursor: Int32[Array, " B"],
    start: Int32[Array, " B"],
    count: Int32[Array, " B"],
) -> Shaped[Array, "B K S ..."]:
    """`write_ring` along the slots."""
    slots, width = buffer.shape[2], chunk.shape[2]
    if width > slots:  # of a longer run the newest tokens stay
        skipped = jnp.maximum(count - slots, 0)
        cursor, start, count = (cursor + skipped) % slots, start + skipped, count - skipped
    if width == 1:
        return _written(buffer, chunk, (cursor, start, count))
    first = jnp.minimum(count, slots - cursor)
    return _written(buffer, chunk, (cursor, start, first), (jnp.zeros_like(cursor), start + first, count - first))


def _written(buffer: Array, chunk: Array, *runs: tuple[Array, Array, Array]) -> Array:
    """The buffer with runs of the chunk's tokens in it: (slot of the first, its number, how many)."""

    def own(buffer: Array, chunk: Array, *flat: Array) -> Array:
        size = buffer.shape[2]
        for slot, start, count in zip(*[iter(flat)] * 3, strict=True):
            first = slot - place()[0] * size  # from here on, counted from this device's first slot
            before = jnp.maximum(-first, 0)  # tokens of the run for devices in front
            cursor = jnp.clip(first, 0, size)
            mine = jnp.clip(count - before, 0, size - cursor)
            buffer = write_linear(buffer, chunk, cursor, start + before, mine, axis=2)
        return buffer

    slots, tokens = slot_names(buffer, "slots"), slot_names(buffer, None)
    flat = [x for run in runs for x in run]
    names = slots, tokens, *[_ROWS] * len(flat)
    written: Array = per_device_call(own, names, slots, (buffer, chunk, *flat))
    return written


def read_ring_over_devices(
    buffer: Shaped[Array, "B K S ..."], oldest: Int32[Array, " B"], width: int
) -> Shaped[Array, "B K width ..."]:
    """`read_ring` along the slots: the sum of what each device has of them."""

    def own(buffer: Array, oldest: Array) -> Array:
        (index, devices), size = place(), buffer.shape[2]
        at = (oldest[:, None] + jnp.arange(width, dtype=jnp.int32)) % (size * devices) - index * size
        shape = (at.shape[0], 1, width) + (1,) * (buffer.ndim - 3)
        found = jnp.take_along_axis(buffer, jnp.clip(at, 0, size - 1).reshape(shape), axis=2, mode="clip")
        found = jnp.where(((at >= 0) & (at < size)).reshape(shape), found, jnp.zeros_like(found))
        wide = jnp.issubdtype(found.dtype, jnp.floating)  # one device has it: exact, in the dtype of other sums
        return jax.lax.psum(found.astype(accumulator(found.dtype)) if wide else found, AXIS).astype(buffer.dtype)

    names = slot_names(buffer, "slots")
    read: Array = per_device_call(own, (names, _ROWS), slot_names(buffer, None), (buffer, oldest))
    return read


def slot_names(buffer: Array, slots: str | None) -> Names:
    """Of the dimensions of an array [B, K, S, ...], the third's being `slots`; K may be 1 where heads share it."""
    return ("batch", None if buffer.shape[1] == 1 else "kv_heads", slots, *[None] * (buffer.ndim - 3))


def query_names(query: Query) -> tuple[Names, ...]:
    """Of the dimensions of `query_arrays`."""
    back: Names = ("batch", None) if query.back is None or query.back.ndim == 2 else ("batch", "kv_heads", None)
    return QUERY, ("batch", None), _ROWS, ("heads",), back


def query_arrays(query: Query) -> tuple[Array | None, ...]:
    """What a device is given of a query that attends to its slots."""
    return query.q, query.position, query.seen, query.slopes, query.back


def query_of(query: Query, q: Array, position: Array, seen: Array, slopes: Any, back: Any) -> Query:
    """`query` as a device has it, of its own rows and heads."""
    given = {"q": q, "raw_q": q, "position": position, "seen": seen, "slopes": slopes, "back": back}
    return dataclasses.replace(query, **given, valid=None, sink_logits=None, block=None)
