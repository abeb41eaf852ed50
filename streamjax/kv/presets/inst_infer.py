"""InstInfer (Pan et al., arXiv 2409.04992): attention is computed where keys and values lie.

The published rule: keys and values of all tokens go to a storage drive that can compute. In decoding a query is sent
there, the drive reads the tokens that the query is likely to attend to, by the largest channels of the query, and sends
back what attention gives. Here the drive is the host, with its memory and its processor. Keys and values of all but the
newest `window` tokens lie in it; the device has bounds of each page (as Quest, 2406.10774) and chooses by them; the
host reads the `top_k` best pages of each key head and sends back a partial, which the device merges with the window's.
With `top_k` of all pages, capacity / page + 1, it is attention offload (Chen et al., 2405.01814), which reads all. The
queries of a prompt are many: the pages that they choose are copied to the device.

XLA runs that part of the program on the host (`jax.experimental.compute_on`). A token's page is written before the host
reads, so that nothing is copied there. For one device; on a CPU, whose two memories are one,
it is `quest`.

With attend_on="mesh" the drive is a second mesh of devices (`streaming.by_layer.second_mesh`), which has the bounds
too, chooses by them, and answers a prompt's queries as well; read in any other way it is `quest`.
"""

from typing import Literal

from streamjax.field_checks import Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.pages.indexes import MinMax
from streamjax.kv.presets.registry import at_most, dividing, pages, register
from streamjax.kv.tiers.pages import Pages, Placement
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="InstInfer: In-Storage Attention Offloading for Cost-Effective Long-Context LLM Inference, arXiv 2409.04992",
    page=dividing("page"),
    top_k=at_most("top_k", pages),
)
def inst_infer(
    sinks: Size = 4, window: Size = 64, capacity: Size = 262144, page: Size = 16, top_k: Size = 64, block: Size = 16,
    attend_on: Literal["host", "mesh"] = "host",
) -> Cascade:  # fmt: skip
    """Keep `capacity` tokens in the host's memory, where a token's attention to the `top_k` best pages is computed."""
    placement: Placement = "host" if attend_on == "host" else "device"
    found = Pages(page, capacity, top_k, MinMax(), block, placement=placement, attend_on=attend_on)
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window), found)
