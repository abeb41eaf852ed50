"""xKV (Chang et al., arXiv 2503.18893): groups of layers share the coordinates of their tokens.

The published rule: at a prompt's end the keys before rotation of `layers` neighbouring layers, side by side, are
decomposed to one rank, and so are the values; each token's coordinates are stored once for the group, and each layer
has its own part of the basis. What is generated stays as it is. `sj.compact(model, state, sj.kv.preset("xkv"))` does
so; ranks are shares of the group's channels, by default the paper's for Llama 3.1 8B (512 and 768 of 4,096), and `room`
tokens may follow. No stream can begin with it, so chunks play no part in what is stored.
"""

from streamjax.field_checks import Fraction, Size
from streamjax.kv.layouts.across_layers import Groups
from streamjax.kv.presets.registry import register


@register(paper="xKV: Cross-Layer SVD for KV-Cache Compression, arXiv 2503.18893")
def xkv(layers: Size = 4, keys: Fraction = 0.125, values: Fraction = 0.1875, room: Size = 1024) -> Groups:
    """At compaction: `layers` neighbours share the shares `keys` and `values` of their channels, in one basis."""
    return Groups(room, layers, keys, values)
