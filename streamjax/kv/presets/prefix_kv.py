"""PrefixKV (Wang et al., arXiv 2412.03409): every layer keeps the tokens that hold the same share of its attention.

The published rule: on a few samples, the attention that tokens get is sorted and summed in each layer, and a search
finds the share at which the sizes that hold it add up to the total; these sizes are used for every prompt. Sinks and
the last token stay. Here `calibration` names a file with what was measured on a text (`sj.measure_budget(...,
queries=None)`); without one `sj.compact` measures the prompt itself. A token's attention is the mean over heads, so all
heads keep the same tokens, as in the published code. By default there are `levels` sizes at most, in eighths of the
mean, so that layers and prompts share compiled programs; with `levels=0` each layer has its own, as published.
"""

from pathlib import Path

from streamjax.field_checks import Count
from streamjax.kv.budgets.budgeted import Budgeted, few_sizes
from streamjax.kv.budgets.calibration import Calibration
from streamjax.kv.budgets.prefix_kv import Prefixes
from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.h2o import H2O
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient "
    "Generation, arXiv 2412.03409"
)
def prefix_kv(
    calibration: str | Path = "", sinks: int = 4, window: int = 32, size: int = 924, every: int = 64,
    levels: Count = 4,
) -> Budgeted:  # fmt: skip
    """Keep sinks, the newest tokens and heavy hitters: as many in each layer as hold the same share of attention."""
    kept = Scored(size, H2O(), per_head=False, every=every)
    cascade = Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window), kept)
    measured = Calibration.load(calibration) if calibration else None
    return Budgeted(cascade, Prefixes(), measured, *few_sizes(size, levels))
