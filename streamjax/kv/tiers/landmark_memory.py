"""The chunk memory of a stream: pages that are encoded when they are full, found by a learned landmark (HSA).

Beside `Pages`, which stores keys as attention made them: here a page is made of a layer's inputs, by an encoder that
sees the whole page, and several layers read it. A page is chosen by its landmark (2504.16795).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from streamjax.attention.landmarks.page_attention import LandmarkPages
from streamjax.field_checks import Count, Size, check_fields
from streamjax.kv.cache import Cache
from streamjax.kv.query import KVSpec, KVTokens, Query, State
from streamjax.kv.slots.ring_buffer import write_ring

Encode = Callable[[Float[Array, "B P S E"]], LandmarkPages]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkMemoryState:
    """chunks: a ring of P pages. number: of each page in its stream, -1 where it is empty. pending: the layer's inputs
    that no page has yet, `filled` of S. complete: pages of the stream so far.
    """

    chunks: LandmarkPages
    number: Int32[Array, "B 1 P"]
    pending: Float[Array, "B 1 S E"]
    filled: Int32[Array, " B"]
    complete: Int32[Array, " B"]

    def complete_before(self, width: int) -> Int32[Array, "B C"]:
        """For each of the next `width` tokens, how many pages of its stream are complete before it."""
        offset = self.filled[:, None] + jnp.arange(width, dtype=jnp.int32)
        return self.complete[:, None] + offset // self.pending.shape[2]


@dataclasses.dataclass(frozen=True)
class ChunkMemory(Cache):
    """What a layer keeps whose inputs are remembered: its own cache, and the newest tokens in pages.

    Args:
      capacity_tokens: in all pages; rounded up to whole pages.
      top_k: pages that a token reads; as many as the model was trained with where 0.
      size: tokens of a page; the model's where 0.
      own: the layer's own cache.

    `init_state` fills in what the model decides. The oldest page makes room for the newest. A token that would see a
    page which later tokens of its chunk push out does not see it.

    Raises:
      ValueError: no room for a page, or for the pages that are to be read.
    """

    capacity_tokens: Size
    top_k: Count = 0
    size: Count = 0
    own: Cache | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.size and self.top_k > self.pages:
            where = f"{self.capacity_tokens} tokens lie in {self.pages} chunks of {self.size}"
            raise ValueError(f"the chunk memory's top_k is {self.top_k}, but {where}")

    @property
    def pages(self) -> int:
        return -(-self.capacity_tokens // self.size)

    @property
    def slots(self) -> int:
        return self.capacity_tokens

    @property
    def span(self) -> int:
        return 0 if self.own is None else self.own.span  # pages have no positions

    @property
    def capacity(self) -> int | None:
        return None if self.own is None else self.own.capacity

    @property
    def reach(self) -> int | None:
        return None

    @property
    def needs_ids(self) -> bool:
        return self.own is not None and self.own.needs_ids

    @property
    def alters_every(self) -> int | None:
        """Of the layer's own cache; pages of the memory complete between chunks (`speculative.two_phases.harmless`)."""
        return None if self.own is None else self.own.alters_every

    @property
    def notes_attention(self) -> bool:
        return self.own is not None and self.own.notes_attention

    def unaltered(self, state: tuple[State, ChunkMemoryState]) -> Int32[Array, " B"] | int:
        return 1 if self.own is None else self.own.unaltered(state[0])

    def init(self, spec: KVSpec) -> tuple[State, ChunkMemoryState]:
        if self.own is None or not self.size:
            raise ValueError("a chunk memory is for models with hierarchical sparse attention: ModelConfig.hsa is None")
        return self.own.init(spec), self.empty(spec)

    def empty(self, spec: KVSpec) -> ChunkMemoryState:
        """The memory alone, of heads as `spec` says; the layer's own cache may have others."""
        shape = (spec.batch_size, spec.kv_heads, self.pages)
        chunks = LandmarkPages(
            jnp.zeros((*shape, self.size, spec.head_dim), spec.dtype),
            jnp.zeros((*shape, self.size, spec.head_dim), spec.dtype),
            jnp.zeros((*shape, spec.head_dim), spec.dtype),
        )
        number = jnp.full((spec.batch_size, 1, self.pages), -1, jnp.int32)
        pending = jnp.zeros((spec.batch_size, 1, self.size, spec.width), spec.dtype)
        return ChunkMemoryState(chunks, number, pending, spec.counter(), spec.counter())

    def update(
        self, state: tuple[State, ChunkMemoryState], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], tuple[State, ChunkMemoryState]]:
        """The layer's own attention; its inputs go into the memory by `insert`."""
        assert self.own is not None
        out, own = self.own.update(state[0], query, tokens)
        return out, (own, state[1])

    def insert(
        self, state: ChunkMemoryState, x: Float[Array, "B C E"], count: Int32[Array, " B"], encode: Encode
    ) -> ChunkMemoryState:
        """Take in a layer's inputs, of which each row has `count`, and encode the pages that are now full."""
        width, size = x.shape[1], self.size
        most = (size - 1 + width) // size  # pages that may become full
        place = jnp.arange(most * size + size, dtype=jnp.int32)
        old = jnp.pad(state.pending[:, 0], ((0, 0), (0, most * size), (0, 0)))
        index = jnp.clip(place - state.filled[:, None], 0, width - 1)
        new = jnp.take_along_axis(x.astype(old.dtype), index[:, :, None], axis=1)
        line = jnp.where((place < state.filled[:, None])[:, :, None], old, new)
        total = state.filled + count
        full = total // size

        def fresh(line: Array) -> LandmarkPages:
            return encode(line[:, : most * size].reshape(line.shape[0], most, size, line.shape[2]).astype(x.dtype))

        if width < size:  # most chunks of the stream fill no page: do not encode one for nothing
            shapes = jax.eval_shape(fresh, line)
            empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            made = jax.lax.cond((full > 0).any(), fresh, lambda line: empty, line)
        else:
            made = fresh(line)
        cursor, nothing = state.complete % self.pages, jnp.zeros_like(full)

        def write(buffer: Array, chunk: Array) -> Array:
            return write_ring(buffer, chunk, cursor, nothing, full, axis=2)

        number = jnp.broadcast_to(state.complete[:, None] + jnp.arange(most, dtype=jnp.int32), (full.shape[0], most))
        rest = jax.vmap(lambda line, start: jax.lax.dynamic_slice_in_dim(line, start, size))(line, full * size)
        return ChunkMemoryState(
            jax.tree.map(write, state.chunks, made),
            write(state.number, number[:, None]),
            rest[:, None],
            total - full * size,
            state.complete + full,
        )
