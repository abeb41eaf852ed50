"""What devices along the mesh axis `context` send each other; all of it runs under `jax.shard_map`.

Device d of P has the d-th of P equal stretches of a sequence. In the zigzag layout it has two of 2 P blocks instead, d
and 2 P - 1 - d: under a causal mask all devices then have the same work (as with the stripes of 2311.09431).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from streamjax.attention.sharded import CONTEXT

AXIS = CONTEXT


def place() -> tuple[Int[Array, ""], int]:
    """Which device of the axis this is, and how many there are."""
    return jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)


def to_next(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """What the device before has; the first one gets the last one's."""
    size = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % size) for i in range(size)])


def to_previous(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """What the next device has; the last one gets the first one's."""
    size = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(x, AXIS, [((i + 1) % size, i) for i in range(size)])


def to_zigzag(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "2 B c ..."]:
    """From stretches to the zigzag layout, T = 2 c."""
    (index, size), halves = place(), jnp.split(x, 2, axis=1)
    even, odd = (
        jax.lax.ppermute(half, AXIS, [(i, _holder(2 * i + n, size)) for i in range(size)])
        for n, half in enumerate(halves)
    )
    is_even = index % 2 == 0
    return jnp.stack((jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)))


def from_zigzag(x: Shaped[Array, "2 B c ..."]) -> Shaped[Array, "B T ..."]:
    """Back to stretches."""
    index, size = place()
    is_even = index % 2 == 0
    blocks = jnp.where(is_even, x[0], x[1]), jnp.where(is_even, x[1], x[0])
    halves = [
        jax.lax.ppermute(block, AXIS, [(_holder(2 * i + n, size), i) for i in range(size)])
        for n, block in enumerate(blocks)
    ]
    return jnp.concatenate(halves, axis=1)


def _holder(block: int, size: int) -> int:
    """The device that has a block in the zigzag layout."""
    return block if block < size else 2 * size - 1 - block


def before(x: Shaped[Array, "B T ..."], count: int) -> Shaped[Array, "B count ..."]:
    """The last `count` tokens before this device's, at most those of all others; zeros where there are none."""
    size, length = jax.lax.axis_size(AXIS), x.shape[1]
    pieces = []
    for distance in range(-(-count // length), 0, -1):
        tail = x[:, length - min(length, count - (distance - 1) * length) :]
        pieces.append(jax.lax.ppermute(tail, AXIS, [(i, i + distance) for i in range(size - distance)]))
    return jnp.concatenate(pieces, axis=1) if pieces else x[:, :0]


def of_device(number: Int[Array, ""] | int, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """What the device with this number has, on all of them; zeros where no device has it."""
    return jax.lax.psum(jnp.where(jax.lax.axis_index(AXIS) == number, x, jnp.zeros_like(x)), AXIS)
