"""Q-Filters (Godey et al., arXiv 2503.02812): keys that point where queries do stay.

The published rule: queries of a trained head lie along one direction, found by a singular value decomposition of those
of some calibration text; a token is worth its key's component along it, so that no attention need be known. `filters`
names a file with these directions (`sj.measure_filters(model, ids).save(FILE)`); without one the direction is that of
the queries that the stream itself has had so far, and its sign that of their mean. The newest tokens stay, as in the
paper's evaluation.
"""

from pathlib import Path

from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.layer_caches.current_chunk import CurrentChunk
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.filter_file import QueryFilters
from streamjax.kv.scores.query_filters import Filters, QFilters
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression, arXiv 2503.02812")
def qfilters(
    filters: str | Path = "", window: int = 64, size: int = 896, every: int = 64
) -> Cascade | tuple[Cache, ...]:
    """Keep the newest `window` tokens, and in each head the `size` others whose keys point where queries do."""

    def cascade(own: Filters | None) -> Cascade:
        return Cascade(Window(window), Scored(size, QFilters(own), every=every))

    def cache(layer: Filters | tuple[str, int]) -> Cache:
        if isinstance(layer, Filters):
            return cascade(layer)
        kind, bound = layer
        return CurrentChunk(bound) if kind == "chunk" else Cascade(Window(bound - 1))

    return tuple(map(cache, QueryFilters.load(filters).layers)) if filters else cascade(None)
