"""VidKV (Tao et al., arXiv 2503.16257): fewer than 2 bits a number, and more for tokens that matter.

The published rule: half of the key channels, those of the greatest range, have 2 bits, the others a sign for each
coefficient of a Fourier transform; values have 1.58 bits by channel, and a fifth of the visual tokens, those that the
question's attention finds, 2 bits. Here the tokens of each head that got most attention are kept in 4 bits, keys and
values, each by itself; a transform of real numbers takes half the signs of a complex one. For text as for video.
"""

from streamjax.field_checks import Fraction, Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.integers import Bits, Int
from streamjax.kv.codecs.mixed import Mixed
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.mean_attention import MeanAttention
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models, arXiv 2503.16257")
def vidkv(
    window: Size = 128, size: Size = 384, bits: Bits = 4, wide: Fraction = 0.5, group: Size = 32, every: Size = 64,
    capacity: Size = 4096,
) -> Cascade:  # fmt: skip
    """Keep the newest tokens as they are, salient ones of each head in 4 bits, and all others in 1.5 and 1.58 bits."""
    salient = Scored(size, MeanAttention(), every=every, codec=Int(bits, fit="error"))
    return Cascade(Window(window), salient, Full(capacity, codec=Mixed(group, wide=wide)))
