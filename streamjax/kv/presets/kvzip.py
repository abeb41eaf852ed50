"""KVzip (Kim et al., arXiv 2505.23416): what a model looks at when it repeats its context stays.

The published rule: the model reads its context a second time, chunk by chunk behind a request to repeat it, and a token
is worth the largest share of attention that any of these queries gives it. What stays then serves every question.
`sj.compact(..., queries=sj.reconstruction(prompt))` with this cache is that rule. Here a share is of all that a query
sees, where the paper counts the first tokens, the chunk that is repeated and the queries' own. In the paper all heads
of all layers compete for one budget; here each head keeps `size`, or with a `floor` below 1 those of a layer compete,
and each is sure of that share of it (`Pooled`). In a stream nothing is read twice: there it is the largest share that
any query so far gave. The first tokens stay.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.kvzip import KVzip
from streamjax.kv.tiers.pooled import Pooled
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink


@register(paper="KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, arXiv 2505.23416")
def kvzip(sinks: int = 4, size: int = 956, every: int = 64, floor: float = 1.0) -> Cascade:
    """Keep the first `sinks` tokens, and in each head the `size` that some query attended to most."""
    first = Sink(sinks, reach=TRUE_DISTANCE)
    if floor < 1:
        return Cascade(first, Pooled(size, KVzip(), every=every, floor=floor))
    return Cascade(first, Scored(size, KVzip(), every=every))
