"""Which blocks of queries and keys meet, as grids that visit no other.

A kernel walks, for one block of queries, the blocks of keys that it sees (forwards, and for the queries' gradient), or
for one block of keys the blocks of queries that see it. A range of blocks follows from the pattern by integer
arithmetic alone, so grids need no tables: they are rectangles of `rows` x `width` steps, and index maps find the pair
of a step.

- Windows make ranges of nearly the same length: a row is a block.
- Full attention makes a triangle. Where it is known at compile time, it is folded: a row holds block p and, behind it,
  block n - 1 - p, together as long for every p. Else `width` is a number that is only known when the kernel runs.

Sinks are not in these ranges: they are few, and kernels treat them apart.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Scalar = Any  # an int, or an int32 scalar that is traced or lies in a kernel


class Step(NamedTuple):
    """One step of a grid: the blocks that meet, and where the step stands in the outer block's run."""

    outer: Scalar
    inner: Scalar
    first: Scalar  # bool: of the outer block's run
    last: Scalar
    runs: Scalar  # bool: false for steps past a row's end, and then all else repeats the last step


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

    def interior(self, i: Scalar, j: Scalar, offset: Scalar) -> Scalar:
        """Whether every query of block i sees every key of block j."""
        first, key = offset + i * self.block_q, j * self.block_k
        inside = key + self.block_k - 1 <= first
        if self.window is not None:
            inside &= key > first + self.block_q - 1 - self.window
        if self.keys % self.block_k:
            inside &= key + self.block_k <= self.keys
        return inside


@dataclasses.dataclass(frozen=True)
class Grid:
    """The rectangle of steps for some ranges; `width` is traced where it depends on a traced offset."""

    ranges: Ranges
    rows: int
    width: Any
    folded: bool

    @classmethod
    def make(cls, ranges: Ranges, offset: Scalar) -> Grid:
        """The smallest rectangle. `offset` is the index of the first query; an int makes the grid exact."""
        n = ranges.blocks
        if isinstance(offset, int):
            low, high = ranges.range(np.arange(n), offset, np)
            counts = np.maximum(high - low, 1)  # a block that meets nothing still has its output written
            plain = n * int(counts.max())
            pairs = counts + np.where(np.arange(n) == n - 1 - np.arange(n), 0, counts[::-1])
            rows = -(-n // 2)
            folded = int(pairs[:rows].max())
            if rows * folded < plain:
                return cls(ranges, rows, folded, True)
            return cls(ranges, n, int(counts.max()), False)
        if ranges.window is not None:
            own, other = (ranges.block_k, ranges.block_q) if ranges.transposed else (ranges.block_q, ranges.block_k)
            straddled = (own + ranges.window - 1 + other - 2) // other + 1  # however the two kinds of blocks lie
            return cls(ranges, n, min(straddled, ranges.inner_blocks), False)
        if ranges.transposed:
            return cls(ranges, n, ranges.inner_blocks, False)
        end = offset + ranges.queries
        width = jnp.clip((end + ranges.block_k - 1) // ranges.block_k, 1, ranges.inner_blocks)
        return cls(ranges, n, width, False)

    @property
    def steps(self) -> int | None:
        """How many steps the grid has, where that is known."""
        return self.rows * self.width if isinstance(self.width, int) else None

    def step(self, row: Scalar, n: Scalar, offset: Scalar) -> Step:
        """Step n of a row."""
        outer = row
        low, high = self.ranges.range(row, offset)
        count = jnp.maximum(high - low, 1)
        if self.folded:
            mirror = self.ranges.blocks - 1 - row
            second = (n >= count) & (mirror != row)
            other_low, other_high = self.ranges.range(mirror, offset)
            n = jnp.where(second, n - count, n)
            outer = jnp.where(second, mirror, row)
            low, high = jnp.where(second, other_low, low), jnp.where(second, other_high, high)
            count = jnp.maximum(high - low, 1)
        runs = n < count
        inner = jnp.minimum(low + jnp.minimum(n, count - 1), self.ranges.inner_blocks - 1)
        return Step(outer, inner, n == 0, n == count - 1, runs)
