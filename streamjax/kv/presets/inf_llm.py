"""InfLLM (Xiao et al., arXiv 2402.04617): sinks, a window, and blocks of what fell out of it, looked up by a few keys.

The published rule: tokens that leave the local window form blocks of 128; a block is represented by the mean of the 4
keys that got most attention while they were in the window, for each query head; a stretch of queries, by its mean,
reads the 16 blocks with the largest dot products, the same for all heads; tokens that do not fill a block yet are
always read. Blocks and sinks stand at one distance, the window's size. Published sizes: 128 sinks, a window of 4,096,
stretches of 512 queries. Here the first sink stands at that distance and the others follow it, a decoded token chooses
for itself, and blocks may be as many as `capacity` holds, of which the oldest go first; with `placement="host"` they
lie in the host's memory, where the paper has them. With `true_distance` nothing is moved, for streams no longer than
the model was trained for: then it is dense attention if every block is read.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.pages.indexes import Representative
from streamjax.kv.presets.registry import at_most, dividing, pages, register
from streamjax.kv.tiers.pages import Pages, Placement
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="InfLLM: Training-Free Long-Context Extrapolation for LLMs, arXiv 2402.04617",
    page=dividing("page"),
    top_k=at_most("top_k", pages),
    representatives=at_most("representatives", lambda options: options["page"]),
)
def inf_llm(
    sinks: int = 128, window: int = 4096, capacity: int = 131072, page: int = 128, top_k: int = 16,
    representatives: int = 4, block: int = 512, placement: Placement = "device", true_distance: bool = False,
) -> Cascade:  # fmt: skip
    """Keep the newest `capacity` tokens in pages at one distance; read those whose most attended keys fit best."""
    pages = Pages(
        page,
        capacity,
        top_k + 1,  # the page that is being filled is one of them
        Representative(representatives),
        block=block,
        distance=None if true_distance else window,
        pool="mean",
        shared=True,
        read_newest=True,
        placement=placement,
    )
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE if true_distance else window), Window(window), pages)
