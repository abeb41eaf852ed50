"""`PagedBatch`: a batch whose streams have pages of one pool: they take what they hold and not what they may hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from streamjax.kv.cache import Cache
from streamjax.kv.pages.page_pool import PagePool, PageTables
from streamjax.kv.query import Implementation
from streamjax.models.decoder import Decoder
from streamjax.models.lora.row_adapters import Factors
from streamjax.serving.batch import Batch
from streamjax.serving.decoding import Drawn
from streamjax.serving.drafts.guessing import Guesses
from streamjax.serving.paging.page_book import PageBook, tables_of
from streamjax.serving.paging.pooled_states import (
    as_dense,
    from_dense,
    in_pool,
    join,
    read_pages,
    split,
    write_pages,
)
from streamjax.serving.row_sampling import RowSampling
from streamjax.serving.row_states import ParkedState, Parking, take_row
from streamjax.streaming.state import StreamState, layer_caches

_LARGEST_PAGE = 64  # tokens


@dataclasses.dataclass(eq=False)
class PagedStream:
    """A stream that is in no row: what it has by itself, its pages, and the tokens that it holds in them."""

    state: StreamState
    pages: list[int]
    held: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class SharedBeginning:
    """A stream that others go on from: what it has by itself, in the host's memory, and full pages of the pool."""

    own: ParkedState
    pages: tuple[int, ...]
    held: int

    @property
    def nbytes(self) -> int:
        """Of the host's memory; its pages are the pool's."""
        return self.own.nbytes


def page_size_for(chunk_size: int) -> int:
    """The largest that divides chunks: streams part between chunks, so what they share are full pages."""
    return max(size for size in range(1, min(chunk_size, _LARGEST_PAGE) + 1) if chunk_size % size == 0)


class PagedBatch(Batch):
    """B rows of streams in a pool of pages, and the reading of one stream beside them. Arguments as of `Batch`.

    A fork has the same pages and takes new ones for what it reads: nothing is copied, and no page is written that
    somebody else reads. Idle streams lie in the host's memory as those of a cache without pages do.

    Args:
      pages: of the pool.
      share: whether rows attend once to the pages that they have in common.
    """

    def __init__(
        self,
        model: Decoder,
        cache: Cache | Sequence[Cache],
        rows: int,
        chunk_size: int,
        block: int,
        dtype: DTypeLike | None = None,
        implementation: Implementation | None = None,
        adapters: Mapping[str, Factors] = MappingProxyType({}),
        *,
        pages: int,
        share: bool = True,
    ):
        self._size, self._share = page_size_for(chunk_size), share
        self._count = pages
        paged = in_pool(layer_caches(model.config, cache), pages, self._size)
        self._width = max(one.pages_of_a_stream for one in paged if isinstance(one, PagePool))
        super().__init__(model, cache, rows, chunk_size, block, dtype, implementation, adapters, held_in=paged)
        self.cut = self._size  # pages are shared whole
        self._counts = [len(jax.tree.leaves(layer)) for layer in self.parking.empty.layers]
        self.capacity = min(filter(None, (self.capacity, self._count * self._size)))
        self.cache_bytes = self.state.cache_bytes + sum(leaf.nbytes for leaf in jax.tree.leaves(self._pools))

    @property
    def widths(self) -> tuple[int, ...]:
        """All rows: the pool and its tables are those of the whole batch."""
        return (self.rows,)

    @property
    def can_be_fused(self) -> bool:
        """Never: rows and what is read beside them write into one pool."""
        return False

    def reset(self) -> None:
        """Empty rows and an empty pool."""
        super().reset()
        self.state, self._pools = split(self.state)
        self._alone = Parking(take_row(self.state, np.int32(0)))
        self.book = PageBook(self._count)
        self._rows: list[list[int]] = [[] for _ in range(self.rows)]
        self._held = [0] * self.rows
        self._tables: PageTables | None = None

    def whole(self) -> StreamState:
        tables = self._tables or tables_of(self._rows, self._width, self._share)
        return join(self.state, self._pools, tables)

    def fresh(self) -> PagedStream:
        return PagedStream(self._alone.empty, [])

    def park(self, stream: PagedStream) -> ParkedState:
        tokens = read_pages(self._pools, stream.pages, stream.held)
        parked = self.parking.park_arrays(as_dense(stream.state, tokens))
        self.drop(stream)
        return parked

    def resume(self, parked: ParkedState) -> PagedStream | None:
        own, tokens, held = from_dense(parked, self._counts, self.state.caches)
        pages = self.book.take(-(-held // self._size))
        if pages is None:
            return None
        self._pools = write_pages(self._pools, pages, tokens)
        return PagedStream(self._alone.resume(own), pages, held)

    def keep(self, stream: PagedStream) -> SharedBeginning:
        pages = tuple(self.book.share(stream.pages))
        return SharedBeginning(self._alone.park(stream.state), pages, stream.held)

    def fork(self, beginning: SharedBeginning) -> PagedStream:
        return PagedStream(self._alone.resume(beginning.own), self.book.share(beginning.pages), beginning.held)

    def drop(self, stream: PagedStream | SharedBeginning) -> None:
        self.book.give_back(stream.pages)
        if isinstance(stream, PagedStream):
            stream.pages = []

    def gives_room(self, beginning: SharedBeginning) -> bool:
        return self.book.only_holder(beginning.pages)

    def reserve(self, stream: PagedStream | int, tokens: int) -> bool:
        row = isinstance(stream, int)
        pages, held = (
            (self._rows[stream], self._held[stream]) if isinstance(stream, int) else (stream.pages, stream.held)
        )
        more = min(-(-(held + tokens) // self._size), self._width) - len(pages)
        if more <= 0:
            return True
        taken = self.book.take(more)
        if taken is None:
            return False
        pages += taken
        if row:
            self._tables = None
        return True

    def read(
        self, stream: PagedStream, tokens: Int32[np.ndarray, " T"], scored: bool = False
    ) -> tuple[PagedStream, Float[Array, "1 W"] | None]:
        whole = join(stream.state, self._pools, tables_of([stream.pages], self._width))
        whole, nats = self._read(whole, tokens, scored)
        stream.state, self._pools = split(whole)
        stream.held += len(tokens)
        return stream, nats

    def enter(self, row: int, stream: PagedStream, sampling: RowSampling) -> None:
        super().enter(row, stream.state, sampling)
        self._rows[row], self._held[row], self._tables = stream.pages, stream.held, None

    def leave(self, row: int) -> PagedStream:
        stream = PagedStream(super().leave(row), self._rows[row], self._held[row])
        self._rows[row], self._held[row], self._tables = [], 0, None
        return stream

    def clear(self, row: int) -> None:
        self.book.give_back(self._rows[row])
        self._rows[row], self._held[row], self._tables = [], 0, None

    def grew(self, row: int, tokens: int) -> None:
        self._held[row] += tokens

    def decode(self, active: Bool[np.ndarray, " B"], count: int, guesses: Guesses | None = None) -> Drawn:
        whole, drawn = self._decode(self.whole(), active, count, guesses)
        self._tables = whole.tables
        self.state, self._pools = split(whole)
        return drawn
