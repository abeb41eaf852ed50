"""ZipCache (He et al., arXiv 2405.14256): salient tokens keep 4 bits, the others 2, and none is lost.

The published rule: a token's saliency is the attention that it gets on average from the queries that see it, taken from
a few probe queries; a share of the tokens is salient. Keys are coded by channel, values by token after each channel was
divided by the root of its largest number. Here all queries count, salient are the best of each head, of fixed number,
which are coded token by token, and channels are not divided; tokens wait in a window until there is something to say.
"""

from streamjax.field_checks import Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.integers import Bits, Int
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.mean_attention import MeanAttention
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="ZipCache: Accurate and Efficient KV Cache Quantization, arXiv 2405.14256")
def zipcache(
    window: Size = 128, size: Size = 384, salient_bits: Bits = 4, bits: Bits = 2, group: Size = 64, every: Size = 64,
    capacity: Size = 4096,
) -> Cascade:  # fmt: skip
    """Keep the newest tokens as they are, salient ones of each head in 4 bits, and all others in 2."""
    salient = Scored(size, MeanAttention(), every=every, codec=Int(salient_bits, group=group, fit="error"))
    return Cascade(Window(window), salient, Full(capacity, codec=Int(bits, group=group, fit="error")))
