"""Where the chunk order keeps the keys and values of one kind of layer, and their gradients.

Keys and values of all tokens stay until the backward pass has used them. Gradients need room only for keys that earlier
chunks may still add to: all of them in a layer with full attention, a window's in a layer with one. There the gradients
lie in a buffer that moves along the sequence, behind those of the sinks, which do not move.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from streamjax.attention.blockwise import Blocks
from streamjax.models.config import LayerSpec
from streamjax.models.decoder import Block
from streamjax.training.chunks import Buffer, Sequence, View, attention_blocks, key_block, whole_view


@dataclasses.dataclass(frozen=True)
class KeyStore:
    """Buffers for the keys of layers with one `spec`: of all tokens in order, or, where `behind` is a number, with
    that many empty slots before the first, so that a chunk and the `behind` tokens before it are always a slice.
    """

    spec: LayerSpec
    block_k: int
    slots: int  # of a buffer of all keys
    chunk_size: int
    behind: int | None

    @classmethod
    def make(cls, spec: LayerSpec, sequence: Sequence) -> KeyStore:
        """The store of layers with `spec`."""
        size, total = sequence.chunk_size, sequence.count * sequence.chunk_size
        if spec.window is not None:
            block = min(key_block(), size + spec.window - 1)
            local = math.ceil((spec.sinks + spec.window - 1 + size) / block) * block
            behind = local - size - spec.sinks
            if local < total:
                return cls(spec, block, behind + total, size, behind)
        return cls(spec, sequence.block_k, sequence.slots, size, None)

    @property
    def local(self) -> int:
        """Slots of the keys that one chunk may see, its own included."""
        return self.slots if self.behind is None else self.spec.sinks + self.behind + self.chunk_size

    def blocks(self, block: Block, batch_size: int) -> Blocks:
        """What is static in a chunk's attention."""
        leading = 0 if self.behind is None else self.spec.sinks
        return attention_blocks(block, self.spec, batch_size, self.chunk_size, self.block_k, leading)

    def write(self, keys: Buffer, k: Any, v: Any, row: Any, i: Any) -> Buffer:
        """`keys` with those of chunk i in it."""
        return keys.write(k, v, row, (self.behind or 0) + i * self.chunk_size)

    def view(self, keys: Buffer, row: Any, i: Any, sequence: Sequence) -> tuple[Buffer, View]:
        """What chunk i of layer `row` may see."""
        if self.behind is None:
            return keys, whole_view(sequence, i, row)
        start, sinks = i * self.chunk_size, self.spec.sinks
        near = keys.read(row, start, self.behind + self.chunk_size)
        segments = sequence.segments
        if segments is not None:
            padded = jnp.pad(segments, ((0, 0), (self.behind, 0)))
            segments = jax.lax.dynamic_slice_in_dim(padded, start, self.behind + self.chunk_size, 1)
        if sinks:
            near = near.behind(keys.read(row, self.behind, sinks))
            if segments is not None and sequence.segments is not None:
                segments = jnp.concatenate((sequence.segments[:, :sinks], segments), axis=1)
        return near, View(segments, 0, start - self.behind, self.local, sinks + self.behind, start)

    def open(self, grads: Buffer, row: Any) -> Buffer:
        """The gradients of the keys that a chunk may see, where `grads` are those of the chunk behind it."""
        if self.behind is None:
            return grads
        sinks = self.spec.sinks
        kept = grads.read(row, sinks, self.behind).after_zeros(self.chunk_size)
        return kept.behind(grads.read(row, 0, sinks)) if sinks else kept

    def close(self, grads: Buffer, opened: Buffer, row: Any) -> Buffer:
        """`grads` with what `open` gave, and a chunk has added to, put back."""
        return opened if self.behind is None else grads.put(opened, row)
