"""CurDKV (Sengupta et al., arXiv 2509.15038): tokens whose keys and values are long beside those of their neighbours.

The rule, as kvpress has it: the squared length of each key by the mean of the `local` tokens around it, times the same
of its value, stands for the leverage of its row; the first tokens stay. The paper projects both by a random matrix
first. `sj.compact` with this cache is that rule for a prompt. In a stream each token is judged once, beside all of its
neighbours, so that it does not matter which of them are gone later.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.cur import CUR
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink


@register(paper="Value-Guided KV Compression for LLMs via Approximated CUR Decomposition, arXiv 2509.15038")
def curdkv(sinks: int = 4, size: int = 956, local: int = 16, every: int = 64) -> Cascade:
    """Keep the first `sinks` tokens, and in each head the `size` with long keys and values among their neighbours."""
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Scored(size, CUR(local), every=every))
