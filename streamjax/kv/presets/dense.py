"""Ordinary attention: every token is kept, memory and time per token grow, and there is an end."""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.full import Full


@register(paper="Attention Is All You Need, arXiv 1706.03762")
def dense(capacity: int = 4096) -> Cascade:
    """Keep every token, up to `capacity` tokens; the model as it was pretrained."""
    return Cascade(Full(capacity))
