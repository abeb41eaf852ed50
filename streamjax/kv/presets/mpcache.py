"""MPCache (Zeng et al., arXiv 2501.06807): tokens that got little attention go once, the others are chosen in clusters.

The published rule: at the end of a prompt the attention of its last 20% of queries, on average over the heads of a
layer, says once which tokens stay, 15% to 50% of them. Neighbours among those form clusters, with the largest and the
smallest value of each key channel. A query scores a cluster by one product, with 0.6 of the one and 0.4 of the other;
it ranks clusters of 32 tokens, keeps half of them, ranks clusters of 16 in those, and reads a fifth of all, for each
query head; the first and the last cluster are always read, and so is what is generated.

`sj.compact(model, state, sj.kv.preset("mpcache"), query=prompt[:, -len(prompt) // 5 :])` is that rule at a prompt's
end. In a stream blocks of `every` tokens take the prompt's place, and the attention is that of all queries so far.
Clusters of both levels are so many as `clusters` and `top_k` say, of however many there are, and query heads that share
a key head share them. The code drops tokens below a threshold that it has for each data set; here a share stays, as in
the paper's algorithm. Generated tokens are chosen as the others are, once they have left the window. The paper lets two
neighbouring layers read the same clusters, which saves a comparison in secret shares; a layer's cache here sees its own
queries alone. What is computed in secret in the paper is computed in the open.
"""

from streamjax.field_checks import Fraction, Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.pages.indexes import BlendedBounds
from streamjax.kv.pages.selection import Coarse
from streamjax.kv.presets.registry import at_most, dividing, pages, register
from streamjax.kv.scores.h2o import H2O
from streamjax.kv.selective.static_eviction import StaticEviction
from streamjax.kv.tiers.pages import Pages
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="MPCache: MPC-Friendly KV Cache Eviction for Efficient Private LLM Inference, arXiv 2501.06807",
    page=dividing("page"),
    top_k=at_most("top_k", pages),
    clusters=at_most("clusters", lambda options: -(-pages(options) // 2)),
)
def mpcache(
    sinks: Size = 16, window: Size = 64, keep: Fraction = 0.5, every: Size = 256, capacity: Size = 65536,
    page: Size = 16, clusters: Size = 128, top_k: Size = 64, block: Size = 1,
) -> Cascade:  # fmt: skip
    """Pass a share `keep` of tokens into pages; read the `top_k` best pages of the best `clusters`, which have two."""
    eviction = StaticEviction(max(round(keep * every), 1), H2O(), every=every)
    found = Pages(page, capacity, top_k, BlendedBounds(0.6), block, coarse=Coarse(clusters))
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window), eviction, found)
