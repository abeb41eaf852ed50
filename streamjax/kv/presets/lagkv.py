"""LagKV (Liang et al., arXiv 2504.04704): tokens that stand out from those that follow them stay.

The published rule: the first tokens stay; those behind them lie in blocks of `lag`, and each head measures the tokens
of a block by the range of the next block's keys and values, channel by channel. Of each block it keeps the share whose
channels vary most. `sj.compact` with this cache is that rule for a prompt; in a stream a block is measured when the
next one is whole, and the worst of all that were measured go, so that old blocks lose more with time. There a block is
what comes between two choices, `every` tokens, which are as many as `lag` by default.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.lagkv import LagKV
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink


@register(
    paper="LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important, arXiv 2504.04704",
    every=lambda options: options["lag"],
)
def lagkv(sinks: int = 4, size: int = 892, lag: int = 128, every: int = 128) -> Cascade:
    """Keep the first `sinks` tokens, and in each head the `size` that vary most by the measure of those behind them."""
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Scored(size, LagKV(lag), every=every))
