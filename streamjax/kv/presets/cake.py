"""CAKE (Qin et al., arXiv 2503.12491): layers whose attention is spread and unsteady keep more.

The published rule, for the end of a prompt: the attention of the last queries has in each layer an entropy over tokens
and a variance over queries, and a layer keeps tokens in proportion to a product of their powers. `sj.compact` with this
cache measures that of the prompt, by the queries that it is given. A stream has fixed sizes: `calibration` names a file
with what was measured on a text (`sj.measure_budget`). Within a layer SnapKV's score chooses; the paper's adds the
variance of a token's attention over the queries. Its cascade, which cuts earlier layers again while a prompt is read,
ends at the sizes that are computed at once here. By default there are `levels` sizes at most, in eighths of the mean:
layers that are alike in size share it and their compiled programs, and so do prompts, whose preferences differ.
`levels=0` is the published division, a size a layer.
"""

from pathlib import Path

from streamjax.field_checks import Count
from streamjax.kv.budgets.budgeted import Budgeted, few_sizes
from streamjax.kv.budgets.cake import Preferences
from streamjax.kv.budgets.calibration import Calibration
from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.snapkv import SnapKV
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences, arXiv 2503.12491")
def cake(
    calibration: str | Path = "", window: int = 32, size: int = 928, kernel: int = 5, tau1: float = 1.0,
    tau2: float = 1.0, every: int = 64, levels: Count = 4,
) -> Budgeted:  # fmt: skip
    """As `snapkv`, with `size` others on the mean over layers, by the entropy and the variance of their attention."""
    kept = Cascade(Window(window), Scored(size, SnapKV(window, kernel), every=every))
    measured = Calibration.load(calibration) if calibration else None
    return Budgeted(kept, Preferences(tau1, tau2), measured, *few_sizes(size, levels))
