"""CaM (Zhang et al., ICML 2024): the value of a token that leaves goes into those of the kept tokens behind it.

The published rule: when a token has to go, its value is added to the values of the next `count` kept tokens, in equal
parts, with the probability of its attention over the mean of theirs. Keys stay as they are. Here attention is all that
a token has got (`H2O`), the tokens behind it are those that its tier keeps (the window's newest are not among them),
and the draw is a hash of position and head, so that the result does not depend on how a stream is cut.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.merging.cam import IntoFollowing
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.h2o import H2O
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(paper="CaM: Cache Merging for Memory-efficient LLMs Inference, ICML 2024 (no arXiv number)")
def cam(sinks: int = 4, window: int = 512, size: int = 444, count: int = 32, every: int = 64) -> Cascade:
    """Keep sinks, the newest `window` tokens and `size` others; what leaves adds its value to those that follow."""
    kept = Scored(size, H2O(), every=every, merge=IntoFollowing(count=count))
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window), kept)
