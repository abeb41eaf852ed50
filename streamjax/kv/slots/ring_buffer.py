"""Writing runs of tokens into buffers of fixed size, in place.

A buffer has a slot axis. Each row has a cursor of its own. It takes `count` tokens of its chunk, those from `start` on,
and writes them to slots `cursor`, `cursor + 1`, and so on. With `cursor = 3`, `start = 1` and `count = 2`, the chunk's
tokens 1 and 2 go to slots 3 and 4. A ring wraps at its end; a linear buffer stops there. They take the buffer's dtype.

A donated buffer has to be updated in place. On a CPU a chunk is scattered, token by token: one small loop to compile.
Elsewhere a scatter is slow: a write takes a window of the buffer as wide as the chunk, blends the new tokens into what
was there, and puts the window back; a ring, whose run may wrap, has two windows. One token for each of several rows is
a scatter of single slots everywhere. It is in place too, and it partitions over rows and heads.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped


def _blend(buffer: Array, chunk: Array, at: Array, shift: Array, start: Array, count: Array, axis: int) -> Array:
    """One row: slot `at + i` takes chunk token `i - shift + start` wherever that is one of the `count` tokens."""
    width = chunk.shape[axis]
    index = jnp.arange(width, dtype=jnp.int32) - shift
    shape = [1] * chunk.ndim
    shape[axis] = width
    write = ((index >= 0) & (index < count)).reshape(shape)
    # roll so that chunk token (start + index) stands at its slot: a slice of the chunk doubled
    doubled = jnp.concatenate((chunk, chunk), axis=axis) if width > 1 else chunk
    turned = jax.lax.dynamic_slice_in_dim(doubled, (start - shift) % width, width, axis) if width > 1 else chunk
    old = jax.lax.dynamic_slice_in_dim(buffer, at, width, axis)
    return jax.lax.dynamic_update_slice_in_dim(buffer, jnp.where(write, turned, old), at, axis)


def _row_by_row(write, buffer: Array, chunk: Array, *counters: Array) -> Array:
    """Apply a one-row write to every row; one row alone needs no batching, which keeps its update in place."""
    if buffer.shape[0] == 1:
        return write(buffer[0], chunk[0], *(c[0] for c in counters))[None]
    return jax.vmap(write)(buffer, chunk, *counters)


def _put(buffer: Array, chunk: Array, slot: Array, axis: int) -> Array:
    """Row b's one token goes to slot `slot[b]`; nowhere where that is past the end.

    Every dimension before the slots has an index of its own, equal as they are: a scatter of whole heads at a time
    would have the TPU compiler lay the buffer out slot by slot, and copy it there and back.
    """

    def put(slots: Array, new: Array, at: Array) -> Array:
        return slots.at[at].set(new[0], mode="drop")

    for _ in range(axis):
        put = jax.vmap(put)
    lead = buffer.shape[:axis]
    return put(buffer, chunk, jnp.broadcast_to(slot.reshape(-1, *[1] * (axis - 1)), lead))


def put_tokens(
    buffer: Shaped[Array, "B ..."], chunk: Shaped[Array, "B ..."], slot: Int32[Array, "B ... C"], axis: int = 2
) -> Shaped[Array, "B ..."]:
    """Row b's token i goes to slot `slot[b, i]` along `axis`, nowhere where that is past the end.

    With a dimension for heads, [B, N, C], each head has slots of its own, or N is 1.
    """

    def put(slots: Array, new: Array, at: Array) -> Array:
        return slots.at[at].set(new.astype(slots.dtype), mode="drop")

    for _ in range(axis):  # every dimension before the slots has an index of its own, as in `_put`
        put = jax.vmap(put)
    at = slot.reshape(slot.shape[0], *[1] * (axis + 1 - slot.ndim), *slot.shape[1:])
    return put(buffer, chunk, jnp.broadcast_to(at, (*buffer.shape[:axis], slot.shape[-1])))


def write_linear(
    buffer: Shaped[Array, "B ..."],
    chunk: Shaped[Array, "B ..."],
    cursor: Int32[Array, " B"],
    start: Int32[Array, " B"],
    count: Int32[Array, " B"],
    axis: int,
) -> Shaped[Array, "B ..."]:
    """Append a run to a linear buffer along `axis`; tokens past its end are dropped.

    `cursor` is the first free slot of each row. The chunk may be longer than the buffer.
    """
    slots, width = buffer.shape[axis], chunk.shape[axis]
    if width == 1:
        return _linear_window(buffer, chunk, cursor, start, count, axis)

    def scattered(buffer: Array, chunk: Array, cursor: Array, start: Array, count: Array) -> Array:
        index = jnp.arange(width, dtype=jnp.int32) - start[:, None]
        writes = (index >= 0) & (index < count[:, None])
        return put_tokens(buffer, chunk, jnp.where(writes, cursor[:, None] + index, slots), axis)

    windows = partial(_linear_window, axis=axis)
    return jax.lax.platform_dependent(buffer, chunk, cursor, start, count, cpu=scattered, default=windows)


def _linear_window(buffer: Array, chunk: Array, cursor: Array, start: Array, count: Array, axis: int) -> Array:
    """`write_linear` by a window of the buffer."""
    slots, chunk = buffer.shape[axis], chunk.astype(buffer.dtype)
    if chunk.shape[axis] > slots:  # only a few slots: bring the run's first tokens to the front
        index = (start[:, None] + jnp.arange(slots)) % chunk.shape[axis]
        shape = [chunk.shape[0]] + [1] * (chunk.ndim - 1)
        shape[axis] = slots
        chunk = jnp.take_along_axis(chunk, index.reshape(shape), axis=axis)
        start, count = jnp.zeros_like(start), jnp.minimum(count, slots)
    width = chunk.shape[axis]
    if width == 1 and buffer.shape[0] > 1:
        return _put(buffer, chunk, jnp.where(count > 0, cursor, slots), axis)

    def write(row: Array, new: Array, cursor: Array, start: Array, count: Array) -> Array:
        at = jnp.minimum(cursor, slots - width)
        return _blend(row, new, at, cursor - at, start, count, axis - 1)

    return _row_by_row(write, buffer, chunk, cursor, start, count)


def write_ring(
    buffer: Shaped[Array, "B ..."],
    chunk: Shaped[Array, "B ..."],
    cursor: Int32[Array, " B"],
    start: Int32[Array, " B"],
    count: Int32[Array, " B"],
    axis: int,
    offset: int = 0,
) -> Shaped[Array, "B ..."]:
    """Write a run to a ring along `axis`, the slot after the newest token being `cursor`, in [0, slots).

    The ring is what the buffer has from slot `offset` on. Of a run longer than the ring the newest tokens stay.
    """
    slots, width = buffer.shape[axis] - offset, chunk.shape[axis]
    windows = partial(_ring_windows, axis=axis, offset=offset)
    if width == 1:
        return windows(buffer, chunk, cursor, start, count)

    def scattered(buffer: Array, chunk: Array, cursor: Array, start: Array, count: Array) -> Array:
        index, count = jnp.arange(width, dtype=jnp.int32) - start[:, None], count[:, None]
        writes = (index >= 0) & (index < count) & (index >= count - slots)
        slot = jnp.where(writes, offset + (cursor[:, None] + index) % slots, offset + slots)
        return put_tokens(buffer, chunk, slot, axis)

    return jax.lax.platform_dependent(buffer, chunk, cursor, start, count, cpu=scattered, default=windows)


def _ring_windows(
    buffer: Array, chunk: Array, cursor: Array, start: Array, count: Array, axis: int, offset: int
) -> Array:
    """`write_ring` by windows of the buffer."""
    slots, width, chunk = buffer.shape[axis] - offset, chunk.shape[axis], chunk.astype(buffer.dtype)
    if width > slots:
        before, buffer = jnp.split(buffer, [offset], axis=axis)
        # Slot s takes the newest token of the run that lands on it, if any does.
        age = (cursor[:, None] + count[:, None] - 1 - jnp.arange(slots)) % slots  # 0 is the newest
        index = count[:, None] - 1 - age
        shape = [chunk.shape[0]] + [1] * (chunk.ndim - 1)
        shape[axis] = slots
        source = jnp.clip(start[:, None] + index, 0, width - 1).reshape(shape)
        ring = jnp.where((index >= 0).reshape(shape), jnp.take_along_axis(chunk, source, axis=axis), buffer)
        return jnp.concatenate((before, ring), axis=axis)
    if width == 1 and buffer.shape[0] > 1:
        return _put(buffer, chunk, jnp.where(count > 0, offset + cursor, offset + slots), axis)

    def write(row: Array, new: Array, cursor: Array, start: Array, count: Array) -> Array:
        at = jnp.minimum(cursor, slots - width)
        row = _blend(row, new, offset + at, cursor - at, start, jnp.minimum(count, slots - cursor), axis - 1)
        if width == 1:
            return row
        # what wrapped: chunk tokens from (slots - cursor) on go to slots 0, 1, ...
        done = jnp.minimum(slots - cursor, width)
        return _blend(row, new, jnp.int32(offset), jnp.int32(0), start + done, count - done, axis - 1)

    if width == 1:
        return _row_by_row(write, buffer, chunk, cursor, start, count)
    # Batched even for one row: two windows as scatters stay in place, as updates of a slice they copy the buffer.
    return jax.vmap(write)(buffer, chunk, cursor, start, count)


def read_ring(
    buffer: Shaped[Array, "B ..."], oldest: Int32[Array, " B"], width: int, axis: int
) -> Shaped[Array, "B ..."]:
    """The `width` slots of a ring from slot `oldest` on, in order, wrapping; `width` may exceed the ring."""
    index = (oldest[:, None] + jnp.arange(width, dtype=jnp.int32)) % buffer.shape[axis]
    shape = [buffer.shape[0]] + [1] * (buffer.ndim - 1)
    shape[axis] = width
    return jnp.take_along_axis(buffer, index.reshape(shape), axis=axis, mode="promise_in_bounds")
