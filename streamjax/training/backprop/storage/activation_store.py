"""What the layer order keeps of the forward pass: inputs of layers, of every one or of the first of every segment.

A segment is a run of layers of which only the first one's input is kept; the others' are computed again when the
backward pass comes to it. What is kept lies on the device, in the host's memory, or, of each input, some chunks here
and some there (token-wise swapping, MEMO 2407.12117). Chunks from the host are fetched while the chunk before them is
worked on. The input of the model's first layer is the embedding of the tokens: on the device it is not kept at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.training.backprop.storage.layer_stack import LayerStack, row_major

Carry = TypeVar("Carry")
Chunk = Float[Array, "B C E"]
Chunks = Float[Array, "N B C E"]


class StoredActivations(NamedTuple):
    """Inputs of layers, for each kept position of a row.

    here: on the device, [slots, n, B, C, E], the last n chunks. away: in host memory, the others, [slots, N - n, B, C,
    E]; of single layers a list with one entry a layer.
    """

    here: list[Array]
    away: Any


class ActivationStore:
    """Keeps and gives back the inputs of the layers of `rows`.

    Args:
      rows: the layers.
      segment: layers from one kept input to the next. Within a row of P layers either all inputs are kept (1) or the
        first one's only, so more than 1 is rounded to a multiple of P.
      embed: chunk i of the first layer's input, where that is the model's first; else None.
      count: chunks of a sequence.
      away: how many of them, the first ones, are kept in the host's memory.
    """

    def __init__(self, rows: LayerStack, segment: int, embed: Callable[[Any], Array] | None, count: int, away: int):
        self.rows, self.count, self.away = rows, count, away
        self.embed = None if away else embed
        self.every = segment == 1  # every layer's input is kept
        self.length = max(1, segment // rows.period)  # rows of a segment
        self.segments = -(-rows.count // self.length)

    def empty(self, x: Chunks) -> list[Array]:
        """Place on the device for all that is kept there; `x` is the input of the first layer."""
        slots = [self.segments - (self.embed is not None)]
        slots += [self.rows.count] * (self.rows.period - 1 if self.every else 0)
        return [jnp.zeros((max(n, 1), self.count - self.away, *x.shape[1:]), x.dtype) for n in slots]

    def keep(self, here: list[Array], s: Any, position: int, x: Chunks) -> list[Array]:
        """`here` with the input of segment s in it, or, where all are kept, that of a layer of its only row."""
        if self.away == self.count:
            return here
        here = list(here)
        slot = s if position or self.embed is None else s - 1
        # The embeddings go to slot 0 and are written over: by then they are of no use.
        here[position] = _put(here[position], jnp.maximum(slot, 0), x[self.away :])
        return here

    def send(self, x: Chunks) -> Array | None:
        """The chunks of an input that are kept in the host's memory, there."""
        return jax.device_put(x[: self.away], jax.memory.Space.Host) if self.away else None

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

    def recompute(self, kept: StoredActivations, s: Any, layer: Callable[[Any, int, Chunks], Chunks]) -> Array | None:
        """Inputs of the layers of segment s, the first apart if it is on the device, again; None if all are kept."""
        period = self.rows.period
        if self.every or self.length * period == 1:
            return None
        start, count = self._bounds(s)
        first = 0 if self.away else 1
        x = self._whole(kept, s)
        inner = jnp.zeros((self.length * period - first, *x.shape), x.dtype)
        if self.away:
            inner = _put(inner, 0, x)

        def row(row: Any, carry: tuple[Array, Array], positions: int = period) -> tuple[Array, Array]:
            inner, x = carry
            for position in range(positions):
                x = layer(row, position, x)
                inner = _put(inner, (row - start) * period + position + 1 - first, x)
            return inner, x

        carry = self.walk(s, row, (inner, x), skip_last=True)
        return row(start + count - 1, carry, period - 1)[0]  # the last layer's output is the next segment's input

    def _whole(self, kept: StoredActivations, s: Any) -> Chunks:
        parts = [jax.device_put(self._sent(kept, 0, s), jax.memory.Space.Device)] if self.away else []
        if self.away < self.count:
            parts.append(jax.lax.map(lambda i: self._first(kept, s, i), jnp.arange(self.away, self.count)))
        return jnp.concatenate(parts)

    def reader(self, kept: StoredActivations, inner: Array | None, s: Any, row: Any, position: int) -> ActivationReader:
        """Access to the chunks of the input of a layer in segment s."""
        if inner is not None:
            place = (row - s * self.length) * self.rows.period + position
            if self.away:
                return ActivationReader(lambda i: _get(inner, place, i), None, self.count, 0)
            return ActivationReader(lambda i: self._select(kept, inner, s, place, i), None, self.count, 0)

        def here(i: Any) -> Chunk:
            return _get(kept.here[position], row, i - self.away) if position else self._first(kept, s, i)

        def away(i: Any) -> Chunk:
            found = self._sent(kept, position, s)
            return jax.device_put(jax.lax.dynamic_index_in_dim(found, i, 0, keepdims=False), jax.memory.Space.Device)

        return ActivationReader(here, away, self.count, self.away)

    def _select(self, kept: StoredActivations, inner: Array, s: Any, place: Any, i: Any) -> Chunk:
        """Chunk i of the input of the segment's layer number `place`."""
        if isinstance(place, int):
            return self._first(kept, s, i) if place == 0 else _get(inner, place - 1, i)
        later = jnp.maximum(place - 1, 0)
        return jax.lax.cond(place == 0, lambda: self._first(kept, s, i), lambda: _get(inner, later, i))

    def _first(self, kept: StoredActivations, s: Any, i: Any) -> Chunk:
        """Chunk i of the input of segment s, where it is on the device."""
        embed, here, i = self.embed, kept.here[0], i - self.away
        if embed is None:
            return _get(here, s, i)
        if isinstance(s, int) or self.segments == 1:
            return embed(i) if self.segments == 1 or s == 0 else _get(here, s - 1, i)
        return jax.lax.cond(s == 0, lambda: embed(i), lambda: _get(here, jnp.maximum(s - 1, 0), i))

    def _sent(self, kept: StoredActivations, position: int, s: Any) -> Array:
        """What is in the host's memory of the input of segment s."""
        if not self.rows.stacked:
            return kept.away[s][position]
        return jax.lax.dynamic_index_in_dim(kept.away[position], s, 0, keepdims=False)


@dataclasses.dataclass(frozen=True)
class ActivationReader:
    """Chunks of one layer's input: those below `split` come from the host's memory by `away`, the others by `here`."""

    here: Callable[[Any], Any]
    away: Callable[[Any], Any] | None
    count: int
    split: int

    def beside(self, other: ActivationReader) -> ActivationReader:
        """Pairs of a chunk of this reader and one of another, cut alike."""
        ours, theirs = self.away, other.away
        away = None if ours is None or theirs is None else lambda i: (ours(i), theirs(i))
        return ActivationReader(lambda i: (self.here(i), other.here(i)), away, self.count, self.split)

    def each(self, body: Callable[[Any, Any, Carry], Carry], carry: Carry) -> Carry:
        """`carry = body(i, chunk i, carry)` for all chunks."""
        carry = self._fetched(body, carry, 0, 1)
        if self.split == self.count:
            return carry
        return jax.lax.fori_loop(self.split, self.count, lambda i, carry: body(i, self.here(i), carry), carry)

    def each_back(self, body: Callable[[Any, Any, Carry], Carry], carry: Carry) -> Carry:
        """The same from the last chunk to the first."""

        def last_first(step: Any, carry: Carry) -> Carry:
            i = self.count - 1 - step
            return body(i, self.here(i), carry)

        if self.split < self.count:
            carry = jax.lax.fori_loop(0, self.count - self.split, last_first, carry)
        return self._fetched(body, carry, self.split - 1, -1)

    def _fetched(self, body: Callable[[Any, Any, Carry], Carry], carry: Carry, start: int, stride: int) -> Carry:
        """The chunks from the host: each is fetched while the one before it is worked on."""
        fetch = self.away
        if not self.split or fetch is None:
            return carry

        def step(n: Any, state: tuple[Any, Carry]) -> tuple[Any, Carry]:
            x, carry = state
            i = start + stride * n
            following = fetch(jnp.clip(i + stride, 0, self.split - 1))
            return following, body(i, x, carry)

        return jax.lax.fori_loop(0, self.split, step, (fetch(start), carry))[1]


def _put(buffer: Array, slot: Any, x: Array) -> Array:
    """`buffer` with `x` in a slot.

    In a fixed layout: left to the TPU's compiler it may differ from the one in which a branch of `cond` reads a chunk,
    and then the branch copies the whole buffer for it.
    """
    return row_major(jax.lax.dynamic_update_index_in_dim(buffer, row_major(x), slot, 0))


def _get(buffer: Array, slot: Any, i: Any) -> Chunk:
    """Chunk i of one slot."""
    start = tuple(jnp.asarray(index, jnp.int32) for index in (slot, i, *[0] * (buffer.ndim - 2)))
    return jax.lax.dynamic_slice(buffer, start, (1, 1, *buffer.shape[2:]))[0, 0]
