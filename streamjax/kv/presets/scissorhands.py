"""Scissorhands (Liu et al., arXiv 2305.17118): tokens that are seldom looked at go, many at a time.

The published rule: when a head's cache is full, the latest queries (the history window) are asked how often each token
got less attention than the mean; the newest tokens apart, those with the highest count go, half of the cache at once.
Here the history is the `every` queries since tokens went last, and as many tokens go: with a window of at least as many
all of them saw every token that competes, and counting the times above the mean is the same rule. Tokens keep their
positions.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.scissorhands import Scissorhands
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(
    paper="Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression, "
    "arXiv 2305.17118"
)
def scissorhands(window: int = 128, size: int = 768, every: int = 128, true_distance: bool = True) -> Cascade:
    """Keep the newest `window` tokens, and in each head the `size` others that most queries looked at."""
    distance = None if true_distance else window + size
    return Cascade(Window(window), Scored(size, Scissorhands(), every=every, distance=distance))
