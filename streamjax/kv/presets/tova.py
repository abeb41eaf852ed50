"""TOVA (Oren et al., arXiv 2401.06104): the token that the newest query attends to least goes.

The published rule: after each token, the one with the smallest attention from it, averaged over all heads of the layer,
is dropped for all heads; no token is safe for its age. Here 64 tokens are dropped at once after every 64 (`every=1` is
the published pace). `sj.compact` with this cache is the rule at the end of a prompt.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.tova import TOVA
from streamjax.kv.tiers.scored import Scored


@register(paper="Transformers are Multi-State RNNs, arXiv 2401.06104")
def tova(size: int = 960, every: int = 64) -> Cascade:
    """Keep the `size` tokens, for all heads of a layer alike, that the newest query attends to most."""
    return Cascade(Scored(size, TOVA(), per_head=False, every=every))
