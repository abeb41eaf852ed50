"""The arrays of a pytree that are on this process's devices as bytes, and back, bit for bit."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from streamjax.checkpoints.pytrees import named_arrays

Tree = TypeVar("Tree")
Place = tuple[str, tuple[tuple[int, int], ...]]  # an array's name, and where in it a shard lies
_LENGTH = 8  # bytes that say how long the JSON in front is
_CHECK = 4  # bytes of the check sum at the end


class Shard(NamedTuple):
    """A part of an array."""

    name: str
    bounds: tuple[tuple[int, int], ...]
    dtype: np.dtype
    data: Any


def to_parts(tree: Any, about: dict[str, Any]) -> list[Any]:
    """Buffers that together are a snapshot of this process: a dictionary that JSON can hold, then shards.

    Equal shards, which several of its devices have, are there once. Shards are copied from devices all at once.
    """
    shards = list(_local_shards(tree))
    for shard in shards:
        shard.data.copy_to_host_async()
    # A copy: on a CPU the next step would overwrite the very memory that is read.
    arrays = [np.array(shard.data).reshape(-1).view(np.uint8) for shard in shards]
    listed = [
        [shard.name, shard.bounds, str(shard.dtype), array.size] for shard, array in zip(shards, arrays, strict=True)
    ]
    head = json.dumps({"about": about, "shards": listed, "processes": jax.process_count()}).encode()
    return [len(head).to_bytes(_LENGTH, "little"), head, *arrays]


def sealed(parts: list[Any]) -> list[Any]:
    """The buffers of a snapshot, and a check sum behind them."""
    check = 0
    for part in parts:
        check = zlib.crc32(part, check)
    return [*parts, check.to_bytes(_CHECK, "little")]


def from_bytes(data: bytearray, template: Tree) -> tuple[Tree, dict[str, Any]]:
    """The tree and the dictionary of sealed bytes, in the structure and on the devices of `template`.

    Raises:
      ValueError: the bytes are not those that were sealed, the snapshot is of other arrays, or they lay on devices in
        another way.
    """
    view = memoryview(data)
    if zlib.crc32(view[:-_CHECK]) != int.from_bytes(view[-_CHECK:], "little"):
        raise ValueError("its bytes are damaged")
    length = int.from_bytes(data[:_LENGTH], "little")
    start = _LENGTH + length
    head = json.loads(bytes(data[_LENGTH:start]))
    places: dict[Place, tuple[int, int, str]] = {}
    for name, bounds, dtype, size in head["shards"]:
        places[name, tuple((low, high) for low, high in bounds)] = start, size, dtype
        start += size
    wanted = {(shard.name, shard.bounds): str(shard.dtype) for shard in _local_shards(template)}
    if head["processes"] != jax.process_count() or wanted != {place: found[2] for place, found in places.items()}:
        raise ValueError("the snapshot is of a run on other devices")

    def array(name: str, like: Any) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            bounds = _bounds(index, like.shape)
            begin, size, _ = places[name, bounds]
            found = np.frombuffer(data, np.uint8, size, begin).copy().view(like.dtype)
            return found.reshape([high - low for low, high in bounds])

        return jax.make_array_from_callback(like.shape, like.sharding, piece)

    leaves = [array(name, leaf) for name, leaf in named_arrays(template).items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), head["about"]


def _local_shards(tree: Any) -> Iterator[Shard]:
    for name, leaf in named_arrays(tree).items():
        seen = set()
        for shard in leaf.addressable_shards:
            bounds = _bounds(shard.index, leaf.shape)
            if bounds not in seen:
                seen.add(bounds)
                yield Shard(name, bounds, leaf.dtype, shard.data)


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
