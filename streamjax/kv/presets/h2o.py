"""H2O (Zhang et al., arXiv 2306.14048): the newest tokens, and those that have got most attention so far.

The published rule: each head sums the attention that every token gets, and after each token drops the one outside of
the newest with the smallest sum; half of the cache is for the newest, half for the heavy hitters. Here it drops after
every 64 tokens as many at once (`every=1` is the published pace), query heads that share a key head vote together, and
tokens keep their positions; with `true_distance=False` all but the newest stand at the window's far end, for streams
that go beyond the length a model was trained on.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.h2o import H2O
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(
    paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv 2306.14048"
)
def h2o(window: int = 512, size: int = 448, every: int = 64, true_distance: bool = True) -> Cascade:
    """Keep the newest `window` tokens, and in each head the `size` others with the most attention so far."""
    distance = None if true_distance else window + size
    return Cascade(Window(window), Scored(size, H2O(), every=every, distance=distance))
