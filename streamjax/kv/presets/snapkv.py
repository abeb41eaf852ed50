"""SnapKV (Li et al., arXiv 2404.14469): the last queries vote for what each head keeps, neighbours together.

The published rule, for the end of a prompt: the attention of the last `window` queries, summed and pooled over `kernel`
neighbours, chooses the tokens of each head; the window itself stays. `sj.compact` with this cache is that rule. In a
stream the last `window` of every 64 queries vote, and what they do not choose is gone. Query heads that share a key
head vote together, where the paper repeats the keys.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.snapkv import SnapKV
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469")
def snapkv(window: int = 32, size: int = 928, kernel: int = 5, every: int = 64, true_distance: bool = True) -> Cascade:
    """Keep the newest `window` tokens, and in each head the `size` others that the last queries attend to."""
    distance = None if true_distance else window + size
    return Cascade(Window(window), Scored(size, SnapKV(window, kernel), every=every, distance=distance))
