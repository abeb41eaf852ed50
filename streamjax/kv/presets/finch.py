"""Finch (Corallo and Papotti, arXiv 2408.00167): a question decides what of a document stays.

The published rule: a document is read piece by piece, each with the question behind it; the attention of the question's
tokens, each weighted by the number of tokens that it sees, chooses what stays of each head's keys and values, and the
next piece is read over that. `sj.compact(model, state, cache, query=question, stored=False)` with this cache is that
rule for one piece, however often it is called. In a stream, which has no question, the last `window` of every 64
queries ask. The paper moves what stays together; here tokens keep their positions.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.finch import Finch
from streamjax.kv.tiers.scored import Scored


@register(paper="FINCH: Prompt-guided Key-Value Cache Compression, arXiv 2408.00167")
def finch(size: int = 960, window: int = 64, every: int = 64) -> Cascade:
    """Keep in each head the `size` tokens that a question, or the last queries, attend to most."""
    return Cascade(Scored(size, Finch(window), every=every))
