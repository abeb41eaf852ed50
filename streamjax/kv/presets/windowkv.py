"""WindowKV (Zuo et al., arXiv 2503.17922): short windows of the text that the last queries attend to.

The published rule, for the end of a prompt: the attention of the last `suffix` queries, all heads of a layer together,
judges windows of `length` tokens, by the mean of their `best` tokens where a question looks for something, and of all
where a text is to be summed up (`best` equal to `length`). `sj.compact` with this cache is that rule, and with
`group=8` so many neighbouring layers keep what the first of them chooses, as in the paper; in a stream each layer has
its own choice. A trained classifier chooses between both ways to judge in the paper; here the caller does. There lower
layers keep more; here what a layer keeps is what you give it.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.snapkv import SnapKV
from streamjax.kv.scores.windowkv import WindowKV
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(
    paper="WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for Efficient LLM Inference, arXiv 2503.17922"
)
def windowkv(suffix: int = 32, size: int = 928, length: int = 8, best: int = 4, every: int = 64) -> Cascade:
    """Keep the newest `suffix` tokens, and `size` others in whole windows whose best tokens the last queries choose."""
    score = WindowKV(SnapKV(suffix, kernel=1), length, best)
    return Cascade(Window(suffix), Scored(size, score, per_head=False, every=every))
