"""StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a rolling window.

The published rule: cache keys before rotation, keep the first `start_size` and the last `recent_size` tokens, and
rotate by position within the cache. Here keys are rotated once when they are written, and only the sinks' distance is
clamped: the window's distances are the same either way.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.sink import Sink
from streamjax.kv.tiers.window import Window


@register(paper="Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453")
def streaming_llm(sinks: int = 4, window: int = 1020) -> Cascade:
    """Keep the first `sinks` tokens and the newest `window`; stable for streams without end."""
    return Cascade(Sink(sinks), Window(window))
