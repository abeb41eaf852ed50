"""KIVI (Liu et al., arXiv 2402.02750): every token, keys in few bits by channel and values by token.

The published rule: asymmetric whole numbers of 2 bits between the least and the greatest of a group of 32; keys have a
group for each channel over 32 tokens, values for each token over 32 channels; the newest 128 tokens stay as they are.
Here groups of tokens are coded one by one, so that 128 to 159 tokens wait, of keys and of values alike, where the paper
codes keys 128 at a time and values token by token. Least and step are bfloat16, rounded outwards, where the paper has
float16. A chunk's queries see their own chunk as it is, as the paper's prompt does. With fit="error", which the paper
does not have, a group's least and step are those with the smallest squared error.
"""

from streamjax.field_checks import Count, Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.integers import Bits, Fit, Int
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.full import Full


@register(paper="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750")
def kivi(bits: Bits = 2, group: Size = 32, residual: Count = 128, capacity: Size = 4096, fit: Fit = "range") -> Cascade:
    """Keep every token up to `capacity`, all but the newest `residual` in `bits` bits a number."""
    return Cascade(Full(capacity, codec=Int(bits, group=group, residual=residual, fit=fit)))
