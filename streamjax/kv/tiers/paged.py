"""What the tiers of pages share: `Pages`, cut by the count, and `ContentPages`, cut by the content."""

from __future__ import annotations

from streamjax.field_checks import Size, check_fields
from streamjax.kv.pages.indexes import Index
from streamjax.kv.tier import KVTokens, Tier


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
    def needs_scores(self) -> bool:
        return self.index.needs_scores

    @property
    def pages(self) -> int:
        """Pages in the buffer."""
        raise NotImplementedError

    def placed(self, tokens: KVTokens) -> KVTokens:
        """Tokens as they are stored: at a fixed distance their keys lie at position 0."""
        return tokens if self.distance is None else tokens.moved(back=True)
