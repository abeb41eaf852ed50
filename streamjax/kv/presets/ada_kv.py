"""AdaKV (Feng et al., arXiv 2407.11550): heads whose attention is spread get more tokens than those that look at few.

The published rule, for the end of a prompt: the scores of all heads of a layer compete for the layer's tokens; of the
number that a head gets so, `1 - floor` counts, and `floor` of an equal share is sure. Scores are SnapKV's. Here sizes
add up to the total exactly, query heads that share a key head vote together, and in a stream the heads compete anew
after every `every` tokens, however it is cut. All heads share one list of slots, so the bytes are those of the total.
With `pyramid=True` layers share the total as in PyramidKV, in `levels` sizes, as there.
"""

from streamjax.field_checks import Count
from streamjax.kv.budgets.ada_kv import OverHeads
from streamjax.kv.budgets.budgeted import Budgeted
from streamjax.kv.budgets.pyramid import Pyramid
from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.snapkv import SnapKV
from streamjax.kv.tiers.pooled import Pooled
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation, arXiv 2407.11550")
def ada_kv(
    window: int = 32, size: int = 928, kernel: int = 5, floor: float = 0.2, every: int = 64, pyramid: bool = False,
    levels: Count = 3,
) -> Cascade | Budgeted:  # fmt: skip
    """Keep the newest `window` tokens, and of all heads together the best others, `size` on the mean."""
    score = SnapKV(window, kernel)
    if pyramid:
        kept = Cascade(Window(window), Scored(size, score, every=every))
        return Budgeted(kept, OverHeads(floor, Pyramid()), distinct=levels)
    return Cascade(Window(window), Pooled(size, score, every=every, floor=floor))
