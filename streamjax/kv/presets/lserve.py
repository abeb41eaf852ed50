"""LServe (Yang et al., arXiv 2502.14866): some heads stream, the others read few pages, found by bounds in two levels.

The published rule for decoding: DuoAttention's gates choose the streaming heads; the other heads keep all tokens in
pages, which hold logical pages with a smallest and a largest key value each; a page is worth what its best logical page
is worth, and a constant number of pages is read. Published sizes: pages of 64 tokens, logical pages of 16, 4,096 tokens
read. Sinks and windows of all heads lie together (`SharedFront`). The paper chooses pages again every few tokens and
shares the choice between; here every token chooses. It keeps weights and caches in few bits, which is a matter of
codecs.
"""

from functools import partial
from pathlib import Path

from streamjax.kv.cascade import Cascade
from streamjax.kv.head_groups import HeadGroups, split_by_gates
from streamjax.kv.pages.indexes import MinMax
from streamjax.kv.presets.registry import at_most, dividing, pages, register
from streamjax.kv.shared_front import SharedFront
from streamjax.kv.tiers.pages import Pages, Placement
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention, arXiv 2502.14866",
    needs=("heads",),
    page=dividing("page"),
    top_k=at_most("top_k", pages),
    logical=dividing("logical", "page"),
)
def lserve(
    heads: str | Path = "", full: float = 0.5, sinks: int = 64, recent: int = 256, capacity: int = 131072,
    page: int = 64, logical: int = 16, top_k: int = 64, block: int = 1, placement: Placement = "device",
) -> tuple[HeadGroups, ...]:  # fmt: skip
    """Stream in some heads; in those of the file `heads` that retrieve, read the `top_k` best pages of `capacity`."""
    if logical < 1 or page % logical:
        raise ValueError(f"cache 'lserve': logical pages of {logical} tokens do not divide pages of {page}")
    streaming = Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(recent), fuse=False)
    pages = Pages(page, capacity, top_k, MinMax(parts=page // logical), block, placement=placement)
    retrieving = Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(recent), pages)
    return split_by_gates("lserve", heads, full, retrieving, streaming, partial(SharedFront, len(streaming.tiers)))
