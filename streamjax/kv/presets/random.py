"""Tokens kept by chance, the baseline of every cache that chooses; kvpress, the library of 2510.00636, has it too."""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.random_choice import RandomChoice
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(
    paper="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution, "
    "arXiv 2510.00636"
)
def random(window: int = 32, size: int = 928, seed: int = 1, every: int = 64, true_distance: bool = True) -> Cascade:
    """Keep the newest `window` tokens, and in each head `size` others by chance; a baseline."""
    distance = None if true_distance else window + size
    return Cascade(Window(window), Scored(size, RandomChoice(seed), every=every, distance=distance))
