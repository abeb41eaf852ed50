"""What the tiers of pages share: `Pages`, cut by the count, and `ContentPages`, cut by the content."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.partial import Partial
from streamjax.field_checks import Size, check_fields
from streamjax.kv.codecs.slots import CodedSlots
from streamjax.kv.noting import Noting
from streamjax.kv.pages.host_memory import in_host_memory
from streamjax.kv.pages.indexes import Index
from streamjax.kv.pages.selection import PageTokens, read_first_pages
from streamjax.kv.query import KVTokens, Query
from streamjax.kv.tier import Tier


class PagedTier(Tier):
    """Tokens in pages of at most `size`, of which a query reads the `top_k` best. Subclasses are frozen dataclasses."""

    size: Size
    capacity: Size
    top_k: Size
    index: Index
    distance: Size | None

    def __post_init__(self) -> None:
        check_fields(self)
        name = type(self).__name__
        if self.capacity < self.size or self.capacity % self.size:
            raise ValueError(f"{name}.capacity must be a multiple of the page size {self.size}, got {self.capacity}")
        if self.top_k > self.pages:
            where = f"{self.capacity} tokens lie in at most {self.pages} pages of {self.size}"
            raise ValueError(f"{name}.top_k is {self.top_k}, but {where}")
        self.index.check(self.size)

    @property
    def slots(self) -> int:
        return self.capacity

    @property
    def span(self) -> int:
        return self.capacity if self.distance is None else 0

    @property
    def wants_noted(self) -> Noting | None:
        return Noting() if self.index.needs_scores else None

    @property
    def pages(self) -> int:
        """Pages in the buffer."""
        raise NotImplementedError

    def placed(self, tokens: KVTokens) -> KVTokens:
        """Tokens as they are stored: at a fixed distance their keys lie at position 0."""
        return tokens if self.distance is None else tokens.moved(back=True)

    def read(
        self, pages: PageTokens, query: Query, held: Int32[Array, " B"], read_chosen: Callable[[], Partial]
    ) -> Partial:
        """`read_chosen()`, which scores all pages and gathers `top_k` for each query; where that is all, without that.

        While no row has more than `top_k` pages, every query chooses all of them. Then they are read as they lie, once
        for all queries of a chunk, and nothing at all where there is none: a stream's first chunks cost what they cost
        a dense cache. One token gathers little; a reverse mode and slots in the host's memory need the way by choice.

        Args:
          held: pages of each row that hold tokens: the first ones, or all where the buffer has been full.
          read_chosen: what is right whatever there is.
        """
        in_host = not isinstance(pages.k, CodedSlots) and in_host_memory(pages.k)
        if query.q.shape[1] == 1 or query.differentiable or in_host:
            return read_chosen()
        if self.top_k >= self.pages:
            return self.read_first(pages, query, held)
        few = jnp.max(held) <= self.top_k
        return jax.lax.cond(few, lambda: self.read_first(pages, query, held), read_chosen)

    def read_first(self, pages: PageTokens, query: Query, held: Int32[Array, " B"]) -> Partial:
        """Attention of all queries to all tokens of the first `held` pages of each row."""
        return read_first_pages(pages, query, held)
