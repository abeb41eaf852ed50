"""RazorAttention (Tang et al., arXiv 2407.15891): retrieval heads keep everything, the others a window and one token.

The published rule: the heads with the largest echo and induction scores keep all tokens; the others drop what is far
but for the first `sinks`, and have one compensation token, the mean of the dropped keys and values, which counts as
often as tokens were dropped. The paper's window is the larger of 4,000 tokens and a fifth of the sequence; a stream has
no length, so it is `recent` here. Which heads are which is read from a file of gates, as for `duo_attention`.
"""

from pathlib import Path

from streamjax.kv.cascade import Cascade
from streamjax.kv.head_groups import HeadGroups, split_by_gates
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.compensation import Compensation
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads, arXiv 2407.15891", needs=("heads",)
)
def razor_attention(
    heads: str | Path = "", full: float = 0.15, sinks: int = 4, recent: int = 4000, capacity: int = 16384
) -> tuple[HeadGroups, ...]:
    """Keep everything in the heads of the file `heads` that retrieve; one token for all that is far in the others."""
    everything = Cascade(Full(capacity))
    short = Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(recent), Compensation())
    return split_by_gates("razor_attention", heads, full, everything, short)
