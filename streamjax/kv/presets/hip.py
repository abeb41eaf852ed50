"""HiP (Lee et al., arXiv 2406.09827): a tree search for the pages that a query reads.

The published rule: for a block of queries, ranges of keys are halved again and again; a range is scored by the key in
its middle, and the best ranges stay. Here a range ends at a page of 16 tokens (the paper's ends at a few keys), and the
newest `window` tokens and the first `sinks` are always read, as in the paper's code.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.pages.indexes import Middle
from streamjax.kv.presets.registry import at_most, dividing, pages, register
from streamjax.kv.tiers.pages import Pages, Placement
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="A Training-free Sub-quadratic Cost Transformer Model Serving Framework with HiP, arXiv 2406.09827",
    page=dividing("page"),
    top_k=at_most("top_k", pages),
)
def hip(
    sinks: int = 4, window: int = 256, capacity: int = 65536, page: int = 16, top_k: int = 64, block: int = 32,
    placement: Placement = "device",
) -> Cascade:  # fmt: skip
    """Keep the newest `capacity` tokens; a block of queries finds its `top_k` pages by halving ranges of them."""
    pages = Pages(page, capacity, top_k, Middle(), block, search="tree", placement=placement)
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window), pages)
