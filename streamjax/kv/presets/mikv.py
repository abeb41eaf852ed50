"""MiKV (Yang et al., arXiv 2402.18096): no token is lost; those that matter little keep few bits.

The published rule: what an eviction policy such as H2O would keep stays in high precision, and what it would evict is
kept too, in 2 to 4 bits, so that no context is lost. Here important tokens are in 8 bits, each by itself, and what
loses among them falls into a tier of `bits` bits, with KIVI's groups; the paper's balancing of outlier channels by the
queries of the prompt has no place there, since keys have a step for each channel.
"""

from typing import Literal

from streamjax.field_checks import Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.integers import Int
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.h2o import H2O
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="No Token Left Behind: Reliable KV Cache Compression via Mixed Precision, arXiv 2402.18096")
def mikv(
    window: Size = 128, size: Size = 384, bits: Literal[8, 4, 2] = 2, group: Size = 64, every: Size = 64,
    capacity: Size = 4096,
) -> Cascade:  # fmt: skip
    """Keep the newest tokens as they are, the most attended of each head in 8 bits, and all others in `bits` bits."""
    important = Scored(size, H2O(), every=every, codec=Int(8, group=group))
    return Cascade(Window(window), important, Full(capacity, codec=Int(bits, group=group)))
