"""Streams of one row: put into a batch, taken out of it, and parked in the host's memory without their empty slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from streamjax.streaming.state import StreamState, batch_axes

_BLOCK = 64  # slots that are compared with empty ones at a time


@jax.jit
def take_row(state: StreamState, row: Int32[Array, ""]) -> StreamState:
    """One stream of a batch, as a state of one row."""
    return jax.tree.map(lambda x, axis: jax.lax.dynamic_slice_in_dim(x, row, 1, axis), state, batch_axes(state))


@partial(jax.jit, donate_argnames="state")
def put_row(state: StreamState, row: Int32[Array, ""], one: StreamState) -> StreamState:
    """The batch with a stream of one row in the place of one of its own; the batch is donated."""
    return jax.tree.map(
        lambda x, part, axis: jax.lax.dynamic_update_slice_in_dim(x, part, row, axis), state, one, batch_axes(state)
    )


def first_rows(state: StreamState, width: int) -> StreamState:
    """The first streams of a batch. For use under `jax.jit`."""
    return jax.tree.map(lambda x, axis: jax.lax.slice_in_dim(x, 0, width, axis=axis), state, batch_axes(state))


def with_first_rows(state: StreamState, few: StreamState) -> StreamState:
    """The batch with other streams in the place of its first ones. For use under `jax.jit`."""
    put = jax.lax.dynamic_update_slice_in_dim
    return jax.tree.map(lambda x, part, axis: put(x, part, 0, axis), state, few, batch_axes(state))


@dataclasses.dataclass(frozen=True)
class ParkedState:
    """A stream of one row in the host's memory: its arrays, each without the empty slots at its end.

    Nothing changes it, so many streams may go on from it.
    """

    arrays: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class Parking:
    """Takes states of one row to the host's memory and back, bit for bit.

    A state has room for all slots from the start. Slots behind the last one that differs, in any bit, from an empty
    state's are left out, so that a short stream takes little.

    Args:
      empty: a state of one row that has read nothing.
    """

    def __init__(self, empty: StreamState):
        def slot_axis(x: Array, axes: object) -> int:
            names = list(axes)  # type: ignore[call-overload]  # a sequence of names
            return x.ndim - len(names) + names.index("slots") if "slots" in names else -1

        self._axes = jax.tree.leaves(empty.map_axes(slot_axis))
        self.caches = empty.caches
        leaves, self._structure = jax.tree.flatten(empty)
        self._empty = [_as_one_slot(np.array(leaf), axis) for leaf, axis in zip(leaves, self._axes, strict=True)]

    @property
    def empty(self) -> StreamState:
        """A state that has read nothing, of arrays of its own."""
        return jax.tree.unflatten(self._structure, [jnp.array(leaf) for leaf in self._empty])

    def park(self, state: StreamState) -> ParkedState:
        """A copy in the host's memory; waits for the state."""
        return self.park_arrays(jax.tree.leaves(state))

    def park_arrays(self, leaves: Sequence[Array | np.ndarray]) -> ParkedState:
        """`park` of a state's arrays, some of which may lack the empty slots at their ends."""
        kept = []
        for leaf, empty, axis in zip(leaves, self._empty, self._axes, strict=True):
            array = np.asarray(leaf)
            if axis >= 0:
                array = array[_first(_filled(array, empty, axis), axis)]
            kept.append(np.array(array, order="C"))
        return ParkedState(tuple(kept))

    def resume(self, parked: ParkedState) -> StreamState:
        """The state on the device, of arrays of its own, which may be donated."""
        leaves = []
        for part, empty, axis in zip(parked.arrays, self._empty, self._axes, strict=True):
            whole = part
            if axis >= 0 and part.shape != empty.shape:
                whole = np.array(empty, order="C")
                whole[_first(part.shape[axis], axis)] = part
            leaves.append(jnp.array(whole, copy=True))
        return jax.tree.unflatten(self._structure, leaves)


def _as_one_slot(empty: np.ndarray, axis: int) -> np.ndarray:
    """An empty array, which takes the memory of one slot where all slots are equal."""
    if axis < 0 or empty.shape[axis] == 0:
        return empty
    one = empty[_first(1, axis)]
    same = np.broadcast_to(one, empty.shape)
    return np.broadcast_to(one.copy(), empty.shape) if same.tobytes() == empty.tobytes() else empty


def _first(count: int, axis: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(count))


def _filled(array: np.ndarray, empty: np.ndarray, axis: int) -> int:
    """Slots up to the last one whose bits are not those of an empty one."""
    array, empty = np.moveaxis(array, axis, 0), np.moveaxis(empty, axis, 0)
    stop = len(array)
    while stop:
        start = max(stop - _BLOCK, 0)
        if array[start:stop].tobytes() != empty[start:stop].tobytes():
            while array[stop - 1].tobytes() == empty[stop - 1].tobytes():
                stop -= 1
            return stop
        stop = start
    return 0
