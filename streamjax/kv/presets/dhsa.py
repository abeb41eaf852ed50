"""DHSA (Xiong et al., arXiv 2510.24606): chunks that end where the content changes, found by length-normalised means.

The published rule: a small network, trained on boundaries labelled beforehand, looks at the keys in a window to the
left and in one to the right of each token and predicts whether a chunk ends there; queries and keys of a chunk are
averaged and scaled by the square root of its length; the similarity of two chunks counts for all pairs of their tokens,
and each query attends to the tokens with the largest, up to a budget of tokens.

What differs here, where the paper's chunks are pages: nothing is trained, and a boundary is decided when its token
comes, without a look to the right: a page ends before a token whose key, before rotation and of all heads together, has
a cosine below `threshold` with the mean of the page's last `context` keys, at `least` tokens at the earliest and at
`page` tokens at the latest. Queries are not averaged over pages: each token chooses for itself, or `block` neighbouring
ones by what one of them wants most. The budget is `top_k` pages of each key head, whatever their lengths. The newest
`window` tokens and the first `sinks` are always read. Where keys change so much that nearly every token starts a page,
or so little that none does, move `threshold`: keys have a mean of their own in each layer and model.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.pages.boundaries import KeyChange
from streamjax.kv.pages.indexes import Mean
from streamjax.kv.presets.registry import at_most, dividing, pages, register
from streamjax.kv.tiers.content_pages import ContentPages
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs, arXiv 2510.24606",
    page=dividing("page"),
    top_k=at_most("top_k", pages),
    least=at_most("least", lambda options: options["page"]),
)
def dhsa(
    sinks: int = 4, window: int = 64, capacity: int = 65536, page: int = 64, top_k: int = 32, context: int = 8,
    threshold: float = 0.5, least: int = 16, block: int = 1,
) -> Cascade:  # fmt: skip
    """Keep tokens in pages that end where keys change, in `capacity` slots; read the `top_k` that fit best."""
    boundary = KeyChange(threshold, context, least)
    pages = ContentPages(page, capacity, top_k, boundary, Mean(power=0.5), block)
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window), pages)
