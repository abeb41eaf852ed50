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

import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_ranges import Ranges, Scalar


class Step(NamedTuple):
    """One step of a grid: the blocks that meet, and where the step stands in the outer block's run."""

    outer: Scalar
    inner: Scalar
    first: Scalar  # bool: of the outer block's run
    last: Scalar
    runs: Scalar  # bool: false for steps past a row's end, and then all else repeats the last step


@dataclasses.dataclass(frozen=True)
class Grid:
    """The rectangle of steps for some ranges; `rows` and `width` are traced where they depend on a traced offset.

    `idle`: whether outer blocks that meet nothing have rows too.
    """

    ranges: Ranges
    rows: Any
    width: Any
    folded: bool
    idle: bool = True

    @classmethod
    def make(cls, ranges: Ranges, offset: Scalar, idle: bool = True) -> Grid:
        """The smallest rectangle. `offset` is the index of the first query; an int makes the grid exact.

        `idle`: outer blocks that meet nothing are visited too, as their output has to be written; without it they are
        not, and `offset` is traced.
        """
        n = ranges.blocks
        if not idle:
            start, stop = ranges.outer(offset)
            return dataclasses.replace(cls.make(ranges, offset), rows=stop - start, idle=False)
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
        return self.rows * self.width if isinstance(self.rows, int) and isinstance(self.width, int) else None

    def step(self, row: Scalar, n: Scalar, offset: Scalar) -> Step:
        """Step n of a row."""
        outer = row = row if self.idle else row + self.ranges.outer(offset)[0]
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
