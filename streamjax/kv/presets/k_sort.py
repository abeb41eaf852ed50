"""K-sort (Trukhanov, Soloveychik, arXiv 2403.20137): block floating point, channels of one size side by side.

The published rule: BFP12, mantissas of 4 bits and an exponent of 8 that channels side by side share, for keys; their
channels are sorted once by the rows of the keys' weights, the queries' with them, so that large ones share exponents.
Here each group of tokens has an order of its own, by the largest number of each channel, a byte a channel; values are
stored in the same way. Fewer than `group` tokens wait in full precision.
"""

from typing import Literal

from streamjax.field_checks import Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.block_floats import BlockFloats
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.full import Full


@register(paper="Accurate Block Quantization in LLMs with Outliers, arXiv 2403.20137")
def k_sort(bits: Literal[8, 4, 2] = 4, block: Size = 16, group: Size = 64, capacity: Size = 4096) -> Cascade:
    """Keep every token up to `capacity` in block floating point, the channels of each group of tokens sorted."""
    return Cascade(Full(capacity, codec=BlockFloats(bits, block=block, group=group)))
