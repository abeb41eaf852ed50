"""DuoAttention (Xiao et al., arXiv 2410.10819): heads that retrieve keep everything, the others stream.

The published rule: a gate for each key head, found by optimisation on synthetic recall, says how much it needs the full
context; the heads with the largest gates keep all tokens, the others the first `sinks` and the newest `recent`. The
files of gates that the authors publish for their models can be read as they are. Keys stay at their true distance in
all heads, as in the published code.
"""

from pathlib import Path

from streamjax.kv.cascade import Cascade
from streamjax.kv.head_groups import HeadGroups, split_by_gates
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


@register(paper="DuoAttention: Efficient Long-Context LLM Inference, arXiv 2410.10819", needs=("heads",))
def duo_attention(
    heads: str | Path = "", full: float = 0.5, sinks: int = 64, recent: int = 256, capacity: int = 16384
) -> tuple[HeadGroups, ...]:
    """Keep everything in the heads of the file `heads` that retrieve, sinks and recent tokens in the others."""
    everything, streaming = Cascade(Full(capacity)), Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(recent))
    return split_by_gates("duo_attention", heads, full, everything, streaming)
