"""One chunk of one layer, forwards and backwards: the step that both orders of chunked backprop repeat.

A layer is token by token but for attention, and attention needs of other tokens their keys and values only. So the
output of a chunk follows from its input and a buffer of keys and values; backwards, the cotangent of its output becomes
that of its input, of the layer's parameters, and of the keys and values of all tokens that it saw. Those are added to a
buffer; when every later chunk has added to it, a chunk's own part of it is complete and goes back through the layer's
projections (StreamBP, 2506.03077, section 3; here without a second pass over the chunks).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels.partial import accumulator
from streamjax.attention.block_cutting import cut_blocks
from streamjax.attention.blockwise import block_sizes
from streamjax.models.config import AttentionMixerConfig
from streamjax.models.mixers.attention import SequenceContext
from streamjax.models.mlps.routing_report import RoutingReport
from streamjax.parallel.rules import constrain
from streamjax.training.backprop.trainable_parameters import is_parameter
from streamjax.training.objectives.objective import Batch, Objective


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkedSequence:
    """B sequences of `length` tokens, cut into N chunks of C tokens, the last one padded with zeros.

    tokens, position: [N, B, C]. segments: [B, N * C] or None. prepared: the objective's arrays, [N, B, C]. whole: the
    same uncut, and those that are not [B, T]. prefix: tokens of a row that layers look at first; all in chunk 0.
    """

    tokens: Int32[Array, "N B C"]
    position: UInt32[Array, "N B C"]
    segments: Int32[Array, "B NC"] | None
    prepared: Batch
    whole: Batch
    length: int = dataclasses.field(metadata={"static": True})
    prefix: Int32[Array, " B"] | None = None

    @classmethod
    def cut(cls, batch: Batch, prepared: Batch, chunk_size: int) -> ChunkedSequence:
        """Cut a batch of tokens [B, T], with positions and segment_ids where it has them."""
        rows, length = batch["tokens"].shape
        positions = batch.get("positions")
        positions = jnp.arange(length) if positions is None else positions
        positions = jnp.broadcast_to(positions, (rows, length)).astype(jnp.uint32)
        segments = batch.get("segment_ids")
        if segments is not None:
            segments = jnp.pad(segments, ((0, 0), (0, -length % chunk_size)))
        return cls(
            tokens=cut_blocks(batch["tokens"], chunk_size),
            position=cut_blocks(positions, chunk_size),
            segments=segments,
            prepared={},
            whole=prepared,
            length=length,
            prefix=batch.get("prefix"),
        ).with_prepared(prepared)

    def with_prepared(self, prepared: Batch) -> ChunkedSequence:
        """This sequence with other arrays to go with its tokens, [B, T, ...] each or left uncut."""
        shape = (self.tokens.shape[1], self.length)
        cut = {name: cut_blocks(x, self.chunk_size) for name, x in prepared.items() if x.shape[:2] == shape}
        return dataclasses.replace(self, prepared=cut, whole=prepared)

    def counted(self, objective: Objective) -> Bool[Array, "N B C"] | None:
        """Which tokens count for an objective; None: all, for what it says."""
        found = objective.counted(self.whole)
        return None if found is None else cut_blocks(found, self.chunk_size)

    def joined(self, x: Array) -> Array:
        """What there is for each token, [N, B, C], of all tokens, [B, T]."""
        return rearrange(x, "n b c -> b (n c)")[:, : self.length]

    def once(self, loss: Float[Array, ""]) -> Float[Array, ""]:
        """A loss of all tokens, as this device's part of a sum over those that share the sequences."""
        return loss

    @property
    def count(self) -> int:
        return self.tokens.shape[0]

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[1]

    @property
    def chunk_size(self) -> int:
        return self.tokens.shape[2]

    @property
    def slots(self) -> int:
        """Slots of a buffer for the keys of all tokens: whole blocks."""
        return math.ceil(self.count * self.chunk_size / self.block_k) * self.block_k

    def pages(self, size: int) -> int:
        """Places for pages of `size` tokens of a chunk memory."""
        return self.count * self.chunk_size // size

    @property
    def block_k(self) -> int:
        return min(key_block(), self.count * self.chunk_size)

    def context(self, i: Any) -> SequenceContext:
        """Where the tokens of chunk i stand."""
        before = None
        if self.segments is not None:
            last = jnp.maximum(jnp.asarray(i * self.chunk_size - 1, jnp.int32), 0)
            before = jax.lax.dynamic_index_in_dim(self.segments, last, 1, keepdims=False)
        index = jnp.arange(self.chunk_size) + i * self.chunk_size
        prefix = None if self.prefix is None else index < self.prefix[:, None]
        return SequenceContext(chunk_at(self.position, i), self.chunk_segments(i), self.length, before, prefix=prefix)

    def chunk_segments(self, i: Any) -> Int32[Array, "B C"] | None:
        if self.segments is None:
            return None
        return jax.lax.dynamic_slice_in_dim(self.segments, i * self.chunk_size, self.chunk_size, 1)

    def key_segments(self) -> Int32[Array, "B S"] | None:
        """Segments of the slots of a buffer of all keys."""
        if self.segments is None:
            return None
        return jnp.pad(self.segments, ((0, 0), (0, self.slots - self.segments.shape[1])))


def key_block() -> int:
    """Keys of a block of attention."""
    return block_sizes()[1]


def chunk_at(x: Array, i: Any) -> Array:
    """Chunk i of an array of chunks."""
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


class KVBuffer(NamedTuple):
    """Keys and values, or their gradients, of R layers: [R, B, K, S, D]."""

    k: Float[Array, "R B K S D"]
    v: Float[Array, "R B K S D"]

    @classmethod
    def zeros(cls, config: AttentionMixerConfig, rows: int, batch: int, slots: int, dtype: Any) -> KVBuffer:
        shape = (rows, batch, config.num_kv_heads, slots, config.head_dim)
        axes = (None, "batch", "kv_heads", None, "head_dim")
        return cls(constrain(jnp.zeros(shape, dtype), *axes), constrain(jnp.zeros(shape, dtype), *axes))

    @classmethod
    def of(cls, k: Float[Array, "B C K D"], v: Float[Array, "B C K D"], dtype: Any) -> KVBuffer:
        """A buffer of one layer with these tokens alone."""
        return cls(*(jnp.swapaxes(x, 1, 2)[None].astype(dtype) for x in (k, v)))

    def write(self, k: Float[Array, "B C K D"], v: Float[Array, "B C K D"], row: Any, slot: Any) -> KVBuffer:
        """This buffer with the keys and values of consecutive tokens in it, the first in `slot`."""
        new = KVBuffer.of(k, v, self.k.dtype)
        return KVBuffer(
            *(jax.lax.dynamic_update_slice(x, y, _index(row, slot)) for x, y in zip(self, new, strict=True))
        )

    def read(self, row: Any, slot: Any, size: int) -> KVBuffer:
        """`size` slots of one layer, as a buffer of one layer."""

        def get(buffer: Array) -> Array:
            _, b, heads, _, width = buffer.shape
            return jax.lax.dynamic_slice(buffer, _index(row, slot), (1, b, heads, size, width))

        return KVBuffer(get(self.k), get(self.v))

    def put(self, other: KVBuffer, row: Any) -> KVBuffer:
        """This buffer with the only layer of another in the place of one of its own."""
        return KVBuffer(*(jax.lax.dynamic_update_slice(x, y, _index(row, 0)) for x, y in zip(self, other, strict=True)))

    def behind(self, other: KVBuffer) -> KVBuffer:
        """The slots of another, and this buffer's behind them."""
        return KVBuffer(*(jnp.concatenate((y, x), axis=3) for x, y in zip(self, other, strict=True)))

    def after_zeros(self, slots: int) -> KVBuffer:
        """This buffer with zeros in front."""
        return KVBuffer(*(jnp.pad(x, ((0, 0),) * 3 + ((slots, 0), (0, 0))) for x in self))

    def own(self, view: KVView, length: int, leading: int) -> KVBuffer:
        """Of a buffer that `view` describes, the slots of the chunk's own tokens."""
        found = self.read(view.row, view.own, length)
        if not leading:
            return found
        index = view.offset + jnp.arange(length)
        first = (index < leading)[:, None]

        def choose(buffer: Array, own: Array) -> Array:
            return jnp.where(first, jnp.take(buffer[:, :, :, :leading], jnp.minimum(index, leading - 1), axis=3), own)

        return KVBuffer(choose(self.k, found.k), choose(self.v, found.v))

    def tokens(self, dtype: Any) -> tuple[Float[Array, "B C K D"], Float[Array, "B C K D"]]:
        """All slots of the only layer, as the projections made them."""
        return jnp.swapaxes(self.k[0], 1, 2).astype(dtype), jnp.swapaxes(self.v[0], 1, 2).astype(dtype)


def _index(row: Any, slot: Any) -> tuple[Array, ...]:
    return tuple(jnp.asarray(index, jnp.int32) for index in (row, 0, 0, slot, 0))


class KVView(NamedTuple):
    """The keys that a chunk may see: a buffer, where its slots stand in the sequence, and where the chunk's own lie.

    row, base, stop: as in `blockwise.Keys`. own: slot of the chunk's first key. offset: index of its first token.
    """

    segments: Int32[Array, "B S"] | None
    row: Any
    base: Any
    stop: Any
    own: Any
    offset: Any


def whole_view(sequence: ChunkedSequence, i: Any, row: Any = 0) -> KVView:
    """For a buffer of all keys in order."""
    start = i * sequence.chunk_size
    return KVView(sequence.key_segments(), row, 0, sequence.length, start, start)


def zeros_like(params: Any, dtype: Any = None) -> Any:
    """Zeros in which gradients of parameters are summed over chunks; in float32 at least where `dtype` is None."""

    def zeros(node: Any) -> Any:
        exact = isinstance(node, RoutingReport)  # counts
        return jax.tree.map(lambda x: jnp.zeros(x.shape, (not exact and dtype) or accumulator(x.dtype)), node)

    return jax.tree.map(zeros, params, is_leaf=is_parameter)


def add(total: Any, part: Any) -> Any:
    """The sum of two trees, in the dtypes of the first."""
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)
