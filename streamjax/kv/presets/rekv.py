"""ReKV (Di et al., arXiv 2503.00540): the window through which a stream is read whose keys all go to disk.

The published rule: encode a stream with sliding-window attention, keep every key and value outside of the device, and
for a question load the pages that each layer finds most like it; `streamjax.streaming.rekv` does that. The paper reads
video, a frame a page, and keeps the pages in host memory or on disk; here a page is a number of tokens, on disk.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.window import Window


@register(paper="Streaming Video Question-Answering with In-context Video KV-Cache Retrieval, arXiv 2503.00540")
def rekv(window: int = 1024) -> Cascade:
    """Read through a window; with `streamjax.streaming.rekv` pages go to disk and a question fetches what it needs."""
    return Cascade(Window(window))
