"""Elastic Cache (Liu et al., arXiv 2407.17678): important tokens are anchors, and take in those that stand near them.

The published rule, for the end of a prompt: the tokens with the most attention, by the mean over heads, are anchors;
every other token joins the anchor that is nearest to it in the text, and keys and values of each bucket are averaged.
`sj.compact` with this cache is that rule. While it generates, the paper drops tokens at a fixed distance; here a stream
goes on as it began, and makes room after every `every` tokens, however it is cut. Of two anchors at one distance the
older takes a token. Keys are averaged rotated, as in the published code, and stand at the anchor's position.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.merging.elastic_cache import Anchors
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.h2o import H2O
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(paper="Efficient Inference of Vision Instruction-Following Models with Elastic Cache, arXiv 2407.17678")
def elastic_cache(sinks: int = 4, window: int = 512, size: int = 444, every: int = 64) -> Cascade:
    """Keep sinks, the newest `window` tokens and `size` anchors, which take in the tokens nearest to them."""
    kept = Scored(size, H2O(), per_head=False, every=every, merge=Anchors())
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window), kept)
