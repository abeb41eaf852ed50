"""PyramidKV (Cai et al., arXiv 2406.02069): lower layers keep more than upper ones, by one step from each to the next.

The published rule, for the end of a prompt: SnapKV's choice in every layer, of sizes that fall arithmetically; the last
layer keeps the mean over `beta`, the first twice the mean less that. `size` is the mean. Sizes follow from a formula,
so a stream has the same, and `sj.compact` with this cache is the literal rule. They are rounded so that they add up to
the total. Query heads that share a key head vote together. By default neighbouring layers share a size, `levels` in
all: layers of one size share their compiled programs, and 30 layers of 30 sizes take 58 CPU seconds to compile.
`levels=0` is the published line.
"""

from streamjax.field_checks import Count
from streamjax.kv.budgets.budgeted import Budgeted
from streamjax.kv.budgets.pyramid import Pyramid
from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.snapkv import SnapKV
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv 2406.02069")
def pyramid_kv(
    window: int = 32, size: int = 928, kernel: int = 5, beta: float = 20.0, every: int = 64, levels: Count = 3
) -> Budgeted:
    """As `snapkv`, with `size` others on the mean over layers: twice as many in the first, few in the last."""
    kept = Cascade(Window(window), Scored(size, SnapKV(window, kernel), every=every))
    return Budgeted(kept, Pyramid(beta), distinct=levels)
