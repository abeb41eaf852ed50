"""FireQ's cache (Baek et al., arXiv 2505.20839): every token in 4 bits, after keys' channels were scaled to one size.

The published rule: symmetric whole numbers of 4 bits, one step for each token of a head. Keys' channels that rotate
together are divided by the largest length of the pair on a text; after rotation 3 channels of each head that still
stand out, and those that they are paired with, by their own largest number; queries are multiplied. Its weights of 4
bits and its kernels are another matter. Here scales are those of each group of tokens, so no text is needed, and keys
are multiplied when they are read; steps and scales are bfloat16. Fewer than `group` tokens wait in full precision.
"""

from typing import Literal

from streamjax.field_checks import Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.fireq import FireQ
from streamjax.kv.codecs.integers import FewChannels
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.full import Full


@register(
    paper="FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration, arXiv 2505.20839"
)
def fireq(bits: Literal[8, 4, 2] = 4, top: FewChannels = 3, group: Size = 64, capacity: Size = 4096) -> Cascade:
    """Keep every token up to `capacity` in few bits, keys' channels scaled in the pairs that rotate together."""
    return Cascade(Full(capacity, codec=FireQ(bits, group=group, top=top)))
