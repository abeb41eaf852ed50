"""KNorm (Devoto et al., arXiv 2406.11430): keys with a small norm stay.

The published rule: of a prompt, each head keeps the tokens whose keys have the smallest L2 norm; in some layers, which
the paper names for its models, everything stays (give those layers a cache of their own). `sj.compact` with this cache
is that rule; in a stream it is applied after every 64 tokens.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.knorm import KNorm
from streamjax.kv.tiers.scored import Scored


@register(paper="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430")
def knorm(size: int = 960, every: int = 64) -> Cascade:
    """Keep in each head the `size` tokens with the shortest keys."""
    return Cascade(Scored(size, KNorm(), every=every))
