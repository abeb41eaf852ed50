"""Q-Filters (Godey et al., arXiv 2503.02812): keys that point where queries do stay.

The published rule: queries of a trained head lie along one direction, found by a singular value decomposition of those
of some calibration text; a token is worth its key's component along it, so that no attention need be known. Here the
direction is that of the queries that the stream itself has had so far; its sign is that of their mean, where the paper
takes that of most of them. The newest tokens stay, as in the paper's evaluation.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.query_filters import QFilters
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression, arXiv 2503.02812")
def qfilters(window: int = 64, size: int = 896, every: int = 64) -> Cascade:
    """Keep the newest `window` tokens, and in each head the `size` others whose keys point where queries do."""
    return Cascade(Window(window), Scored(size, QFilters(), every=every))
