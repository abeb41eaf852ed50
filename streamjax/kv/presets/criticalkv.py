"""CriticalKV (Feng et al., arXiv 2502.03805): attention weighed by how much a value moves the layer's output.

The published rule, over SnapKV: half of what stays is what the last queries attend to most; the other half is chosen by
that attention times the L1 norm of the token's value behind the output projection. `sj.compact` with this cache is that
rule at the end of a prompt; in a stream a choice is made after every 64 tokens. `epsilon` is a share of the attention
that goes to the tokens which compete, where the paper adds it to a token's attention.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.criticalkv import CriticalKV
from streamjax.kv.scores.snapkv import SnapKV
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective, arXiv 2502.03805")
def criticalkv(window: int = 32, size: int = 928, first: float = 0.5, kernel: int = 5, every: int = 64) -> Cascade:
    """Keep the newest `window` tokens, and in each head `size` others that move what the last queries read most."""
    return Cascade(Window(window), Scored(size, CriticalKV(SnapKV(window, kernel), first), every=every))
