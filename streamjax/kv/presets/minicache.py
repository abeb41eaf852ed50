"""MiniCache (Liu et al., arXiv 2405.14366): pairs of neighbouring layers share directions, and keep their lengths.

The published rule: from the middle of the model on, the keys of two layers are one unit vector, interpolated on the
sphere, and two lengths; so are the values; tokens whose vectors differ too much between the layers stay as they are.
`sj.compact(model, state, sj.kv.preset("minicache"))` does so with what the streams hold, and the shared part lies in
their state once; `room` tokens may follow, which stay as they are, where the paper merges what is generated too. The
paper keeps tokens apart by a threshold between the least and the largest angle, and `apart` is how many they are here,
in each key head. A small model pays much for merged keys and little for merged values (docs/caches.md, "Layers that
share"). No stream can begin with it, so chunks play no part in what is stored.
"""

from streamjax.field_checks import Fraction, Size
from streamjax.kv.layouts.across_layers import Pairs
from streamjax.kv.presets.registry import register


@register(paper="MiniCache: KV Cache Compression in Depth Dimension for Large Language Models, arXiv 2405.14366")
def minicache(start: Fraction = 0.5, apart: Fraction = 0.05, toward: Fraction = 0.6, room: Size = 1024) -> Pairs:
    """At compaction: pairs of layers above `start` share each token's direction, the share `apart` of tokens aside."""
    return Pairs(room, start, apart, toward)
