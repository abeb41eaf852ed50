"""Which blocks of keys a block of queries sees under a causal pattern, and the other way round: integer arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Scalar = Any  # an int, or an int32 scalar that is traced or lies in a kernel


def divide(x: Scalar, by: int) -> Scalar:
    """x // by for x >= 0; in kernels the plain operator costs more and asks which chip it is."""
    if not isinstance(x, jax.Array):
        return x // by
    if by & (by - 1):
        return jax.lax.div(x, jnp.int32(by))
    return jax.lax.shift_right_arithmetic(x, jnp.int32(by.bit_length() - 1))


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Ranges of blocks under a causal pattern without its sinks.

    Attributes:
      queries, keys: how many there are, without padding.
      block_q, block_k: tokens of a block.
      window: the newest keys that a query sees, itself included; None for all.
      transposed: whether keys are outside and queries inside.
    """

    queries: int
    keys: int
    block_q: int
    block_k: int
    window: int | None = None
    transposed: bool = False

    @property
    def blocks(self) -> int:
        """Outer blocks."""
        return -(-self.keys // self.block_k) if self.transposed else -(-self.queries // self.block_q)

    @property
    def inner_blocks(self) -> int:
        return -(-self.queries // self.block_q) if self.transposed else -(-self.keys // self.block_k)

    def range(self, i: Scalar, offset: Scalar, xp: Any = jnp) -> tuple[Scalar, Scalar]:
        """Half-open range of the inner blocks that outer block i meets; may be empty."""
        if self.transposed:
            first = i * self.block_k - offset  # as indices of queries
            low = divide(xp.maximum(first, 0), self.block_q)
            high = xp.full_like(low, self.inner_blocks)
            if self.window is not None:
                end = first + self.block_k - 1 + self.window  # one past the last query that sees a key of the block
                high = xp.minimum(divide(xp.maximum(end + self.block_q - 1, 0), self.block_q), self.inner_blocks)
            return xp.minimum(low, high), high
        first = offset + i * self.block_q
        end = xp.minimum(first + self.block_q, offset + self.queries)
        high = xp.minimum(divide(end + self.block_k - 1, self.block_k), self.inner_blocks)
        low = xp.zeros_like(high)
        if self.window is not None:
            low = divide(xp.maximum(first - self.window + 1, 0), self.block_k)
        return xp.minimum(low, high), high

    def outer(self, offset: Scalar) -> tuple[Scalar, Scalar]:
        """Half-open range of the outer blocks of keys that meet queries; not empty."""
        stop = jnp.clip(divide(offset + self.queries + self.block_k - 1, self.block_k), 1, self.blocks)
        if self.window is None:
            return jnp.zeros_like(stop), stop
        return jnp.minimum(divide(jnp.maximum(offset - self.window + 1, 0), self.block_k), stop - 1), stop

    def interior(self, i: Scalar, j: Scalar, offset: Scalar) -> Scalar:
        """Whether every query of block i sees every key of block j."""
        first, key = offset + i * self.block_q, j * self.block_k
        inside = key + self.block_k - 1 <= first
        if self.window is not None:
            inside &= key > first + self.block_q - 1 - self.window
        if self.keys % self.block_k:
            inside &= key + self.block_k <= self.keys
        return inside
