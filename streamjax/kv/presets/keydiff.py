"""KeyDiff (Park et al., arXiv 2504.15364): keys that differ most from the mean key stay.

The published rule: a prompt is read block by block, and after each block every head keeps the tokens whose keys have
the smallest cosine with the mean of all keys' directions. That is what happens here, in the prompt and behind it.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.keydiff import KeyDiff
from streamjax.kv.tiers.scored import Scored


@register(
    paper="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in "
    "Resource-Constrained Environments, arXiv 2504.15364"
)
def keydiff(size: int = 896, every: int = 128) -> Cascade:
    """Keep in each head the `size` tokens whose keys differ most from the mean key."""
    return Cascade(Scored(size, KeyDiff(), every=every))
