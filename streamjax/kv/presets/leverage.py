"""Leverage scores (Compactor, Chari and Van Durme, arXiv 2507.08143): keys that no others could stand in for stay.

The published rule: the statistical leverage of each key before rotation, among all centred keys of its head, tells how
much of the keys' space would be lost with it. The paper projects keys to `sketch` random channels, and adds the
attention that tokens give each other within chunks, future ones included, which a stream cannot know; here leverage
decides alone, exactly unless `sketch` says otherwise. The first and the newest tokens stay. `sj.compact` with this
cache is the rule for a prompt; in a stream those compete that are held.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.leverage import Leverage
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores, arXiv 2507.08143"
)
def leverage(sinks: int = 8, window: int = 4, size: int = 948, sketch: int = 0, every: int = 64) -> Cascade:
    """Keep the first and the newest tokens, and in each head the `size` others with the most unusual keys."""
    first = Sink(sinks, reach=TRUE_DISTANCE)
    return Cascade(first, Window(window), Scored(size, Leverage(sketch), every=every))
