"""A device's stretch of sequences that lie over the mesh axis `context`, cut into chunks; and how large these are."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from streamjax.attention.context.exchange import AXIS, place
from streamjax.attention.context.landmarks import room_for_pages
from streamjax.attention.context.sequence import Exchange
from streamjax.models.mixers.attention import SequenceContext
from streamjax.training.backprop.sequence_chunks import ChunkedSequence
from streamjax.training.objectives.objective import Batch, Objective


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stretch(ChunkedSequence):
    """The d-th of P equal stretches of sequences, on device d; N chunks of C tokens make up N C P tokens exactly.

    tokens, position, segments and prepared are of the stretch alone, `whole` and `length` of all tokens.
    front: segments of the tokens in front of the stretch; of the first one its own. exchange: how devices come to
    each other's keys.
    """

    front: Int32[Array, " B"] | None = None
    exchange: Exchange = dataclasses.field(default="auto", metadata={"static": True})

    @classmethod
    def of(cls, sequence: ChunkedSequence, exchange: Exchange = "auto") -> Stretch:
        """This device's part of a sequence that it has whole; under `jax.shard_map`."""
        index, size = place()
        count = sequence.count // size
        if count * size * sequence.chunk_size != sequence.length:
            raise ValueError(
                f"{size} stretches of {sequence.length} tokens are no whole chunks of {sequence.chunk_size}"
            )
        front = segments = None
        if sequence.segments is not None:
            length = count * sequence.chunk_size
            start = jnp.asarray(index * length, jnp.int32)
            segments = jax.lax.dynamic_slice_in_dim(sequence.segments, start, length, 1)
            last = jnp.maximum(start - 1, 0)
            front = jax.lax.dynamic_index_in_dim(sequence.segments, last, 1, keepdims=False)
        return cls(
            tokens=_own(sequence.tokens, count),
            position=_own(sequence.position, count),
            segments=segments,
            prepared={name: _own(x, count) for name, x in sequence.prepared.items()},
            whole=sequence.whole,
            length=sequence.length,
            front=front,
            exchange=exchange,
        )

    def with_prepared(self, prepared: Batch) -> Stretch:
        """As of a whole sequence: the arrays are [B, T, ...] of all its tokens."""
        found = super().with_prepared(prepared)
        mine = {name: _own(x, self.count) for name, x in found.prepared.items()}
        return dataclasses.replace(self, prepared=mine, whole=prepared)

    def counted(self, objective: Objective) -> Bool[Array, "N B C"] | None:
        found = super().counted(objective)
        return None if found is None else _own(found, self.count)

    def joined(self, x: Array) -> Array:
        """Of all stretches."""
        return super().joined(jax.lax.all_gather(x, AXIS, axis=0, tiled=True))

    def once(self, loss: Float[Array, ""]) -> Float[Array, ""]:
        return jnp.where(place()[0] == 0, loss, 0)

    def pages(self, size: int) -> int:
        """Of this device, whose stretch may begin and end within a page."""
        return room_for_pages(self.count * self.chunk_size, size)

    def context(self, i: Any) -> SequenceContext:
        """Where the tokens of chunk i stand, for what layers do token by token."""
        return SequenceContext(self.position[i], None, self.length)

    def all_chunks(self) -> SequenceContext:
        """Where the tokens of the stretch stand."""
        position = rearrange(self.position, "n b c -> b (n c)")
        return SequenceContext(position, self.segments, self.length, self.front, self.exchange)


def _own(x: Array, count: int) -> Array:
    """This device's chunks, of those of all devices."""
    return jax.lax.dynamic_slice_in_dim(x, jnp.asarray(place()[0] * count, jnp.int32), count, 0)
