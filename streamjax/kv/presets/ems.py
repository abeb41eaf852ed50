"""EMS (Li et al., arXiv 2412.08521): each head evicts the tokens that are like nothing it keeps, and merges the others.

The published rule, for the end of a prompt: a token that is not kept joins the most similar kept key, or a zero class
if none is similar enough, which evicts it; tokens that come together are averaged by their scores. So heads differ in
how much they evict and merge. The paper's Global-Local score takes the larger of the attention of all queries and of
the last ones; here it is that of all queries (`H2O`). In a stream this happens after every `every` tokens, however it
is cut. Keys are compared and averaged rotated, as they are stored, and stand at the kept token's position.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.merging.ems import ZeroClass
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.h2o import H2O
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(
    paper="EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local "
    "Importance, arXiv 2412.08521"
)
def ems(window: int = 512, size: int = 448, threshold: float = 0.6, every: int = 64) -> Cascade:
    """Keep the newest `window` tokens and `size` others in each head; drop what is unlike them, merge the rest."""
    return Cascade(Window(window), Scored(size, H2O(), every=every, merge=ZeroClass(threshold=threshold)))
