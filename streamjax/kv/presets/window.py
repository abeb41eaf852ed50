"""Window attention without sinks: the baseline that collapses once the first tokens leave (2309.17453, figure 1b)."""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.window import Window


@register(paper="Longformer, arXiv 2004.05150; as a baseline in StreamingLLM, arXiv 2309.17453")
def window(window: int = 1024) -> Cascade:
    """Keep the newest `window` tokens only."""
    return Cascade(Window(window))
