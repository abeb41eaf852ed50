"""D2O (Wan et al., arXiv 2406.13035): tokens are recalled into the kept one that is most like them, or dropped.

The published rule: heavy hitters and the newest tokens stay; a token that leaves joins the kept one with the most
similar key if their cosine reaches a threshold, which follows the mean of such cosines (`momentum` is what the newest
mean weighs), and is dropped otherwise. Weights are exponentials of the cosines. Here each head has a threshold of its
own, room is made after every `every` tokens, and the tokens that take others in are the heavy hitters, not the
window's. Layers share the total by how dense their attention is where `calibration` names a file with what was measured
on a text (`sj.measure_budget(..., sj.kv.Density(), queries=None)`), or where `sj.compact` is given that budget; without
they keep as many each. There are `levels` sizes at most, so that layers share compiled programs; 0: one a layer. Keys
are compared and averaged rotated, as in the published code, and stand at the kept token's position.
"""

from pathlib import Path

from streamjax.field_checks import Count
from streamjax.kv.budgets.budgeted import Budgeted
from streamjax.kv.budgets.calibration import Calibration
from streamjax.kv.budgets.d2o import Density
from streamjax.kv.cascade import Cascade
from streamjax.kv.merging.d2o import NearestAbove
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.h2o import H2O
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(
    paper="D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models, "
    "arXiv 2406.13035"
)
def d2o(
    window: int = 512, size: int = 448, momentum: float = 0.7, every: int = 64, calibration: str | Path = "",
    levels: Count = 4,
) -> Cascade | Budgeted:  # fmt: skip
    """Keep the newest `window` tokens and `size` heavy hitters in each head, which take in what is like them."""
    kept = Cascade(Window(window), Scored(size, H2O(), every=every, merge=NearestAbove(momentum=momentum)))
    return Budgeted(kept, Density(), Calibration.load(calibration), distinct=levels) if calibration else kept
