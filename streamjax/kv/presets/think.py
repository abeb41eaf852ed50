"""ThinK (Xu et al., arXiv 2407.21018): every token, its key without the channels that queries make least of.

The published rule: at the end of a prompt each key head drops the channels for which the norm of the last 32 queries
times that of all keys is least, 40% of them; the newest 32 tokens and all that follow stay whole. Here a group of 128
tokens loses channels as soon as it is full, by the queries at its end, so that what is generated is pruned too; and
`sj.compact(model, state, sj.kv.preset("think"), query=prompt[:, -32:])` prunes a prompt when it ends, each group of it
by its own keys and by the queries given. Keys are pruned as they are rotated, as in the paper; values stay whole.
"""

from streamjax.field_checks import Fraction, Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.channels.pruned import PrunedKeys
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.window import Window


@register(paper="ThinK: Thinner Key Cache by Query-Driven Pruning, arXiv 2407.21018")
def think(
    keep: Fraction = 0.6, window: Size = 32, group: Size = 128, queries: Size = 32, capacity: Size = 4096
) -> Cascade:
    """Keep every token up to `capacity`, and of older keys the share `keep` of channels that queries make most of."""
    return Cascade(Window(window), PrunedKeys(capacity, keep, group, queries))
