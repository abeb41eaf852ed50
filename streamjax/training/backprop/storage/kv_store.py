"""Where the chunk order keeps the keys and values of one kind of layer, and their gradients.

The backward pass projects a chunk's keys again from its tokens, so it needs those of other chunks only. In a layer with
full attention that is all of them. In a layer whose window is no longer than a chunk it is what the window reaches of
the chunk before, and the sinks: of each chunk only its tail is kept. Gradients need room for keys that earlier chunks
may still add to: all of them, or the window's. There the gradients lie in a buffer that moves along the sequence,
behind those of the sinks, which do not move.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from streamjax.attention.blockwise import Blocks
from streamjax.models.block import Block
from streamjax.models.config import AttentionMixerConfig
from streamjax.training.backprop.chunk_attention import attention_blocks
from streamjax.training.backprop.sequence_chunks import ChunkedSequence, KVBuffer, KVView, key_block, whole_view


@dataclasses.dataclass(frozen=True)
class KeyStore:
    """Buffers for the keys of layers with one kind of `attention`.

    A chunk sees its own tokens and the `behind` before it; all of them where that is None. Where `tails`, the sinks'
    keys come first in a buffer and the last `behind` of every chunk follow, the first of these empty. Else the keys of
    all tokens lie in order, behind `behind` empty slots, so that what a chunk sees is always a slice.
    """

    attention: AttentionMixerConfig
    block_k: int
    slots: int  # of a buffer of keys
    chunk_size: int
    behind: int | None
    tails: bool = False

    @classmethod
    def make(cls, attention: AttentionMixerConfig, size: int, count: int) -> KeyStore:
        """The store of layers with this attention, for `count` chunks of `size` tokens."""
        total = count * size
        reach = attention.reach
        if reach is not None:
            block = min(key_block(), size + reach - 1)
            local = math.ceil((attention.sinks + reach - 1 + size) / block) * block
            behind = local - size - attention.sinks
            if local < total and 0 < behind <= size and attention.sinks <= size:
                return cls(attention, block, attention.sinks + (count + 1) * behind, size, behind, True)
            if local < total:
                return cls(attention, block, behind + total, size, behind)
        block = min(key_block(), total)
        return cls(attention, block, math.ceil(total / block) * block, size, None)

    @property
    def local(self) -> int:
        """Slots of the keys that one chunk may see, its own included."""
        return self.slots if self.behind is None else self.attention.sinks + self.behind + self.chunk_size

    def empty(self, rows: int, batch: int, dtype: Any, local: bool) -> KVBuffer:
        """Zeros for the keys of `rows` layers, or (`local`) for the gradients of those that a chunk may see."""
        return KVBuffer.zeros(self.attention, rows, batch, self.local if local else self.slots, dtype)

    def blocks(self, block: Block) -> Blocks:
        """What is static in a chunk's attention."""
        leading = 0 if self.behind is None else self.attention.sinks
        return attention_blocks(block, self.chunk_size, self.block_k, leading)

    def write(self, keys: KVBuffer, k: Any, v: Any, row: Any, i: Any) -> KVBuffer:
        """`keys` with those of chunk i in it, as far as others may see them."""
        if self.behind is None or not self.tails:
            return keys.write(k, v, row, (self.behind or 0) + i * self.chunk_size)
        sinks = self.attention.sinks
        if sinks:
            old = keys.read(row, 0, sinks)
            new = KVBuffer.of(k[:, :sinks], v[:, :sinks], keys.k.dtype)
            keys = keys.put(jax.tree.map(lambda a, b: jnp.where(i == 0, b, a), old, new), row)
        return keys.write(k[:, -self.behind :], v[:, -self.behind :], row, sinks + (i + 1) * self.behind)

    def view(
        self, keys: KVBuffer, k: Any, v: Any, row: Any, i: Any, sequence: ChunkedSequence
    ) -> tuple[KVBuffer, KVView]:
        """What chunk i of layer `row` may see, its own keys and values being `k` and `v`, which were written."""
        if self.behind is None:
            return keys, whole_view(sequence, i, row)
        start, sinks = i * self.chunk_size, self.attention.sinks
        if self.tails:
            near = KVBuffer.of(k, v, keys.k.dtype).behind(keys.read(row, sinks + i * self.behind, self.behind))
        else:
            near = keys.read(row, start, self.behind + self.chunk_size)
        segments = sequence.segments
        if segments is not None:
            padded = jnp.pad(segments, ((0, 0), (self.behind, 0)))
            segments = jax.lax.dynamic_slice_in_dim(padded, start, self.behind + self.chunk_size, 1)
        if sinks:
            near = near.behind(keys.read(row, 0 if self.tails else self.behind, sinks))
            if segments is not None and sequence.segments is not None:
                segments = jnp.concatenate((sequence.segments[:, :sinks], segments), axis=1)
        return near, KVView(segments, 0, start - self.behind, self.local, sinks + self.behind, start)

    def open(self, grads: KVBuffer, row: Any) -> KVBuffer:
        """The gradients of the keys that a chunk may see, where `grads` are those of the chunk behind it."""
        if self.behind is None:
            return grads
        sinks = self.attention.sinks
        kept = grads.read(row, sinks, self.behind).after_zeros(self.chunk_size)
        return kept.behind(grads.read(row, 0, sinks)) if sinks else kept

    def close(self, grads: KVBuffer, opened: KVBuffer, row: Any) -> KVBuffer:
        """`grads` with what `open` gave, and a chunk has added to, put back."""
        return opened if self.behind is None else grads.put(opened, row)
