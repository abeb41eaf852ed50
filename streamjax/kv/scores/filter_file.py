"""`QueryFilters`: the filters of a whole model, measured on a text, in a file (Q-Filters, Godey et al., 2503.02812)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from streamjax.checkpoints.measured_files import MeasuredLayers
from streamjax.kv.scores.query_filters import Filters


@dataclasses.dataclass(frozen=True)
class QueryFilters(MeasuredLayers[Filters]):
    """What `sj.measure_filters` has measured; `save` writes it, and the preset takes the file (`filters=FILE`)."""

    kind = "query filters"
    what = "filters of queries"
    otherwise = "it has no filters of queries"
    ends = ("",)
    tables = "filters"
    card = (
        "Q-Filters (arXiv 2503.02812): of each layer and key head the direction of its queries, from their singular"
        " value decomposition; for the cache preset qfilters of streamjax, and for this model alone."
    )

    @staticmethod
    def tables_of(layer: Filters) -> Sequence[np.ndarray]:
        return layer.arrays

    @staticmethod
    def layer_of(tables: Sequence[np.ndarray], model: str) -> Filters:
        return Filters.from_arrays(*tables, model=model)
