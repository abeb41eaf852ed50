"""Expected Attention (Devoto et al., arXiv 2510.00636): what the queries so far make one expect of those to come.

The published rule, for the end of a prompt: queries before rotation are taken for normal, with the mean and the
covariance of the prompt's; a token is worth the attention that such queries at the next `ahead` positions would give it
on average, times the length of its value. The first tokens stay. `sj.compact(..., query=prompt)` with this cache is
that rule; in a stream the moments are those of all queries so far, and a choice is made after every 64 tokens. With
`covariance=False` only the mean query counts; the state is smaller by the covariances, which small budgets cannot hold.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.expected_attention import ExpectedAttention
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink


@register(
    paper="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution, "
    "arXiv 2510.00636"
)
def expected_attention(
    sinks: int = 4, size: int = 956, ahead: int = 512, every: int = 64, covariance: bool = True
) -> Cascade:
    """Keep the first `sinks` tokens, and in each head the `size` that queries to come should attend to most."""
    score = ExpectedAttention(ahead, skip=sinks, covariance=covariance)
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Scored(size, score, every=every))
