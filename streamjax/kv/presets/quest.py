"""Quest (Tang et al., arXiv 2406.10774): keep every token, read the pages whose bounds promise most.

The published rule: pages of 16 tokens, each with the smallest and the largest key value of every channel; a query
scores a page by the largest product that these bounds allow and reads the best pages of a token budget, for each head.
The paper leaves the first two layers dense and chooses for each query head; here all layers are alike (`init_state`
takes one cascade a layer for anything else), and query heads that share a key head share its pages. The newest `window`
tokens and the first `sinks` are always read.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.pages.indexes import MinMax
from streamjax.kv.presets.registry import at_most, dividing, pages, register
from streamjax.kv.tiers.pages import Pages, Placement
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774",
    page=dividing("page"),
    top_k=at_most("top_k", pages),
)
def quest(
    sinks: int = 4, window: int = 64, capacity: int = 65536, page: int = 16, top_k: int = 64, block: int = 1,
    placement: Placement = "device",
) -> Cascade:  # fmt: skip
    """Keep the newest `capacity` tokens in pages; each token reads the `top_k` pages that promise most."""
    # Sinks at their true distance: nothing here is ever out of the range that the stream itself has.
    pages = Pages(page, capacity, top_k, MinMax(), block, placement=placement)
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window), pages)
