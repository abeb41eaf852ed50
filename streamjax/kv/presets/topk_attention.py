"""Top-k attention (Gupta et al., arXiv 2106.06899): a query attends to its largest logits and to nothing else.

The published rule: of all keys each query of each head takes the `top_k` with the largest products, exactly; a sequence
is read in blocks of queries, so that not all products exist at once. Here tokens lie in pages of `page`, a page is
worth what its best key is worth, and `page=1` is the published rule; query heads that share a key head share its pages.
The newest `window` tokens and the first `sinks` are always read. It stores everything and reads all keys, but few
values: what it costs is the half of attention, what it shows is what any index of pages could reach.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.pages.indexes import BestKey
from streamjax.kv.presets.registry import at_most, dividing, pages, register
from streamjax.kv.tiers.pages import Pages
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="Memory-efficient Transformers via Top-k Attention, arXiv 2106.06899",
    page=dividing("page"),
    top_k=at_most("top_k", pages),
)
def topk_attention(
    sinks: int = 4, window: int = 16, capacity: int = 65536, page: int = 8, top_k: int = 64, block: int = 1
) -> Cascade:
    """Keep the newest `capacity` tokens; each token reads the `top_k` small pages with the largest logits."""
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window), Pages(page, capacity, top_k, BestKey(), block))
