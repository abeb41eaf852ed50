"""GEAR (Kang et al., arXiv 2403.05527): every token in few bits, and what the bits miss as low rank and outliers.

The published rule: codes by KIVI's groups; outliers, 2% of the numbers, are kept apart; a matrix of low rank for each
head stands for the rest of what was lost, rank 4 in a prompt and 2 for the tokens that follow, 20 of which wait until
they are coded. Here each group of tokens has its factors, a prompt's too. Outliers are the numbers of each token that
the codes miss most; see `Gear`.
"""

from streamjax.field_checks import Count, Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.gear import Gear
from streamjax.kv.codecs.integers import Bits, FewChannels
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.full import Full


@register(paper="GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Inference, arXiv 2403.05527")
def gear(
    bits: Bits = 2, group: Size = 64, rank: FewChannels = 2, outliers: FewChannels = 1, residual: Count = 64,
    capacity: Size = 4096,
) -> Cascade:  # fmt: skip
    """Keep every token up to `capacity` in few bits, with factors of low rank and outliers of what these miss."""
    return Cascade(Full(capacity, codec=Gear(bits, group=group, residual=residual, rank=rank, outliers=outliers)))
