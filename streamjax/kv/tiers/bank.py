"""`Bank`: a layer's old tokens, which the layer does not read itself (LongMem, Wang et al., 2306.07174)."""

from __future__ import annotations

import dataclasses

from pallas_kernels.partial import Partial
from streamjax.field_checks import Size
from streamjax.kv.pages.indexes import Index, Mean
from streamjax.kv.query import Query
from streamjax.kv.tiers.pages import Pages, PagesState


@dataclasses.dataclass(frozen=True)
class Bank(Pages):
    """`Pages` for a side network: the layer stores its tokens here and reads none, another layer's queries recall them.

    A cascade that ends in a bank attends as it would without. Models without a side network keep none
    (`streaming.state`).
    """

    index: Index = dataclasses.field(default_factory=Mean)
    distance: Size | None = 512

    @property
    def reach_back(self) -> int:
        return 0

    def attend(self, state: PagesState, query: Query, reach: int | None) -> Partial:
        return query.nothing()

    def recall(self, state: PagesState, query: Query) -> Partial:
        """Attention of another layer's queries to the pages that they choose."""
        return super().attend(state, query, None)
