"""Chunks one after another, inside a program, and where their tokens stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Int32, UInt32


def in_turn(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
    """`lax.scan`, or the body alone for one chunk, which compiles faster and runs without the loop's copies."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        carry, y = body(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda leaf: leaf[None], y)
    return jax.lax.scan(body, carry, xs)


class Places(NamedTuple):
    """The arrays of a `ChunkContext`, of N chunks."""

    position: UInt32[Array, "N B C"]
    valid: Bool[Array, "N B C"]
    seen: Int32[Array, "N B"]
    ids: Int32[Array, "N B C"] | None
