"""What the layer order keeps of the forward pass: inputs of layers, of every one or of the first of every segment.

A segment is a run of layers of which only the first one's input is kept; the others' are computed again when the
backward pass comes to it. The input of the model's first layer is never kept: it is the embedding of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.training.rows import Rows

Carry = TypeVar("Carry")
Chunks = Float[Array, "N B C E"]
Kept = list[Array]  # for each kept position of a row, inputs [slots, N, B, C, E]


class Inputs:
    """Keeps and gives back the inputs of the layers of `rows`.

    Args:
      rows: the layers.
      segment: layers from one kept input to the next. Within a row of P layers either all inputs are kept (1) or the
        first one's only, so more than 1 is rounded to a multiple of P.
      embed: chunk i of the first layer's input, where that is the model's first; else None.
    """

    def __init__(self, rows: Rows, segment: int, embed: Callable[[Any], Array] | None):
        self.rows, self.embed = rows, embed
        self.every = segment == 1  # every layer's input is kept
        self.length = max(1, segment // rows.period)  # rows of a segment
        self.segments = -(-rows.count // self.length)

    def empty(self, x: Chunks) -> Kept:
        """Place for all that is kept; `x` is the input of the first layer."""
        slots = [self.segments - (self.embed is not None)]
        slots += [self.rows.count] * (self.rows.period - 1 if self.every else 0)
        return [jnp.zeros((max(n, 1), *x.shape), x.dtype) for n in slots]

    def keep(self, kept: Kept, s: Any, position: int, x: Chunks) -> Kept:
        """`kept` with the input of segment s in it, or, where all are kept, that of a layer of its only row."""
        kept = list(kept)
        if position == 0:
            # The embeddings go to slot 0 and are written over: by then they are of no use.
            slot = s - 1 if self.embed is not None else s
            kept[0] = _put(kept[0], jnp.maximum(slot, 0), x)
        elif self.every:
            kept[position] = _put(kept[position], s, x)
        return kept

    def walk(self, s: Any, body: Callable[[Any, Carry], Carry], carry: Carry, skip_last: bool = False) -> Carry:
        """`carry = body(row, carry)` for the rows of segment s."""
        start, count = self._bounds(s, skip_last)
        return self.rows.loop(0, count, lambda i, carry: body(start + i, carry), carry)

    def walk_back(self, s: Any, body: Callable[[Any, Carry], Carry], carry: Carry) -> Carry:
        """The same from the last row to the first."""
        start, count = self._bounds(s)
        return self.rows.loop_back(0, count, lambda i, carry: body(start + i, carry), carry)

    def _bounds(self, s: Any, skip_last: bool = False) -> tuple[Any, Any]:
        start = s * self.length
        left: Any = self.length
        if self.rows.count % self.length:
            rest = self.rows.count - start
            left = min(left, rest) if isinstance(rest, int) else jnp.minimum(left, rest)
        return start, left - skip_last

    def recompute(self, kept: Kept, s: Any, layer: Callable[[Any, int, Chunks], Chunks]) -> Array | None:
        """Inputs of the layers of segment s but the first, computed again; None if all are kept."""
        period = self.rows.period
        if self.every or self.length * period == 1:
            return None
        start, count = self._bounds(s)
        x = jax.lax.map(lambda i: self._first(kept, s, i), jnp.arange(kept[0].shape[1]))
        inner = jnp.zeros((self.length * period - 1, *x.shape), x.dtype)

        def row(row: Any, carry: tuple[Array, Array], positions: int = period) -> tuple[Array, Array]:
            inner, x = carry
            for position in range(positions):
                x = layer(row, position, x)
                inner = _put(inner, (row - start) * period + position, x)
            return inner, x

        carry = self.walk(s, row, (inner, x), skip_last=True)
        return row(start + count - 1, carry, period - 1)[0]  # the last layer's output is the next segment's input

    def reader(self, kept: Kept, inner: Array | None, s: Any, row: Any, position: int) -> Callable[[Any], Array]:
        """A function from i to chunk i of the input of a layer in segment s."""
        if self.every and position:
            return lambda i: _get(kept[position], row, i)
        if inner is None:
            return lambda i: self._first(kept, s, i)
        later, place = inner, (row - s * self.length) * self.rows.period + position

        def read(i: Any) -> Array:
            if isinstance(place, int):
                return self._first(kept, s, i) if place == 0 else _get(later, place - 1, i)
            return jax.lax.cond(
                place == 0, lambda: self._first(kept, s, i), lambda: _get(later, jnp.maximum(place - 1, 0), i)
            )

        return read

    def _first(self, kept: Kept, s: Any, i: Any) -> Array:
        """Chunk i of the input of segment s."""
        embed = self.embed
        if embed is None:
            return _get(kept[0], s, i)
        if isinstance(s, int) or self.segments == 1:
            return embed(i) if self.segments == 1 or s == 0 else _get(kept[0], s - 1, i)
        return jax.lax.cond(s == 0, lambda: embed(i), lambda: _get(kept[0], jnp.maximum(s - 1, 0), i))


def _put(buffer: Array, slot: Any, x: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(buffer, x, slot, 0)


def _get(buffer: Array, slot: Any, i: Any) -> Array:
    """Chunk i of one slot."""
    start = tuple(jnp.asarray(index, jnp.int32) for index in (slot, i, *[0] * (buffer.ndim - 2)))
    return jax.lax.dynamic_slice(buffer, start, (1, 1, *buffer.shape[2:]))[0, 0]
