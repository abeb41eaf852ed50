"""Runs of tokens written into rings and linear buffers, against plain Python lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.kv.slots.ring_buffer import _linear_window, _ring_windows, read_ring, write_linear, write_ring

write_ring = jax.jit(write_ring, static_argnames=("axis", "offset"))
write_linear = jax.jit(write_linear, static_argnames="axis")
# What is written by windows, as on every platform but this one.
ring_windows = jax.jit(_ring_windows, static_argnames=("axis", "offset"))
linear_window = jax.jit(_linear_window, static_argnames="axis")
read_ring = jax.jit(read_ring, static_argnames=("width", "axis"))

# slots, chunk width, batch, leading slots that are not the ring's: narrow, as wide, wider; a few static shapes only
SHAPES = [(5, 1, 1, 0), (5, 1, 3, 2), (5, 5, 1, 2), (5, 9, 3, 0), (4, 7, 1, 3), (1, 3, 1, 1), (6, 4, 3, 2)]


def ints(values) -> jax.Array:
    return jnp.array(values, jnp.int32)


@st.composite
def runs(draw, slots: int, width: int, batch: int, cursor_end: int):
    """Cursor, start and count of each row; the run lies in the chunk."""
    rows = []
    for _ in range(batch):
        start = draw(st.integers(0, width - 1))
        rows.append((draw(st.integers(0, cursor_end)), start, draw(st.integers(0, width - start))))
    return rows


def arrays(batch: int, slots: int, width: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """A buffer of negative tags and a chunk of positive ones, the slot axis being `axis` of three or four."""
    buffer = -1.0 - np.arange(batch * slots, dtype=np.float32).reshape(batch, slots)
    chunk = 1.0 + np.arange(batch * width, dtype=np.float32).reshape(batch, width)
    if axis == 1:
        return np.stack((buffer, buffer * 10), -1), np.stack((chunk, chunk * 10), -1)
    return np.stack((buffer, buffer * 10), 1)[..., None], np.stack((chunk, chunk * 10), 1)[..., None]


def by_list(buffer: np.ndarray, chunk: np.ndarray, rows, axis: int, place) -> np.ndarray:
    """Write token by token; `place(cursor, i)` is the slot of a run's i-th token, None to drop it."""
    buffer, chunk = np.moveaxis(buffer, axis, 1).copy(), np.moveaxis(chunk, axis, 1)
    for row, (cursor, start, count) in enumerate(rows):
        for i in range(count):
            slot = place(cursor, i)
            if slot is not None:
                buffer[row, slot] = chunk[row, start + i]
    return np.moveaxis(buffer, 1, axis)


@pytest.mark.quick
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=40)
@given(data=st.data())
def test_ring_writes(shape, data):
    slots, width, batch, offset = shape
    axis = 2 if width % 2 else 1
    rows = data.draw(runs(slots, width, batch, slots - 1))
    buffer, chunk = arrays(batch, offset + slots, width, axis)
    cursor, start, count = (ints(column) for column in zip(*rows, strict=True))
    expected = by_list(buffer, chunk, rows, axis, lambda cursor, i: offset + (cursor + i) % slots)
    for write in (write_ring, ring_windows):
        got = write(jnp.asarray(buffer), jnp.asarray(chunk), cursor, start, count, axis=axis, offset=offset)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.quick
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=40)
@given(data=st.data())
def test_linear_writes(shape, data):
    slots, width, batch, _ = shape
    axis = 1 if width % 2 else 2
    rows = data.draw(runs(slots, width, batch, slots))
    buffer, chunk = arrays(batch, slots, width, axis)
    cursor, start, count = (ints(column) for column in zip(*rows, strict=True))
    expected = by_list(buffer, chunk, rows, axis, lambda cursor, i: cursor + i if cursor + i < slots else None)
    for write in (write_linear, linear_window):
        got = write(jnp.asarray(buffer), jnp.asarray(chunk), cursor, start, count, axis=axis)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.quick
@pytest.mark.parametrize(("slots", "width", "batch"), [(5, 3, 2), (5, 5, 1), (4, 11, 3), (1, 2, 1)])
def test_reads_wrap(slots, width, batch):
    buffer, _ = arrays(batch, slots, 1, 2)
    for first in range(slots):
        oldest = [(first + row) % slots for row in range(batch)]
        got = read_ring(jnp.asarray(buffer), ints(oldest), width=width, axis=2)
        for row in range(batch):
            expected = buffer[row][:, [(oldest[row] + i) % slots for i in range(width)]]
            np.testing.assert_array_equal(got[row], expected)


@pytest.mark.quick
def test_a_write_takes_the_dtype_of_its_buffer():
    buffer, chunk = arrays(1, 5, 3, 2)
    for write in (write_ring, write_linear):
        got = write(jnp.asarray(buffer, jnp.bfloat16), jnp.asarray(chunk), ints([0]), ints([0]), ints([3]), axis=2)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got[:, :, :3], chunk.astype(jnp.bfloat16))
