"""COMET's KV4 (Liu et al., arXiv 2410.12168): every token in 4 bits, keys by channel and values by token.

The published rule: asymmetric whole numbers of 4 bits, keys by channel since these have outlier channels, in groups of
tokens; values by token. Its weights and activations of 4 bits, and its kernels, are another matter. Here least and step
of 64 numbers are bfloat16, and fewer than 64 tokens wait in full precision.
"""

from streamjax.field_checks import Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.integers import Fit, Int
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.full import Full


@register(paper="COMET: Towards Practical W4A4KV4 LLMs Serving, arXiv 2410.12168")
def comet(group: Size = 64, capacity: Size = 4096, fit: Fit = "range") -> Cascade:
    """Keep every token up to `capacity` in 4 bits."""
    return Cascade(Full(capacity, codec=Int(4, group=group, fit=fit)))
