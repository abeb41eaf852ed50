"""ZipVL (He et al., arXiv 2410.08584): important tokens keep 4 bits, as many as each layer's attention needs; others 2.

The published rule: in every layer the fewest tokens that hold the share `held` of the attention are important; prompts
attend to these alone, and caches keep 4 bits of them and 2 of the others. A layer's number follows each prompt. Here
sizes never change: layers share one total in proportion to what they need on a text (`calibration`, which is that of
PrefixKV, `sj.measure_budget(...)`), or in `sj.compact` on the prompt at hand, and prompts attend to everything. Which
tokens are important is each head's choice, by mean attention, as in ZipCache. By default there are `levels` numbers at
most, in eighths of the mean, so that layers and prompts share compiled programs; with `levels=0` one a layer.
"""

from pathlib import Path

from streamjax.field_checks import Count, Fraction, Size
from streamjax.kv.budgets.budgeted import Budgeted, few_sizes
from streamjax.kv.budgets.calibration import Calibration
from streamjax.kv.budgets.zipvl import Important
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.integers import Int
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.mean_attention import MeanAttention
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification, arXiv 2410.08584")
def zipvl(
    calibration: str | Path = "", held: Fraction = 0.975, window: Size = 128, size: Size = 384, group: Size = 64,
    every: Size = 64, capacity: Size = 4096, levels: Count = 4,
) -> Budgeted:  # fmt: skip
    """Keep important tokens in 4 bits, `size` of a layer on average and more where attention is spread, others in 2."""
    important = Scored(size, MeanAttention(), every=every, codec=Int(4, group=group, fit="error"))
    cascade = Cascade(Window(window), important, Full(capacity, codec=Int(2, group=group, fit="error")))
    measured = Calibration.load(calibration) if calibration else None
    return Budgeted(cascade, Important(held), measured, *few_sizes(size, levels))
