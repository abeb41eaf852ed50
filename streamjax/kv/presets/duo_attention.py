"""DuoAttention (Xiao et al., arXiv 2410.10819): heads that retrieve keep everything, the others stream.

The published rule: a gate for each key head, found by optimisation on synthetic recall, says how much it needs the full
context; the heads with the largest gates keep all tokens, the others the first `sinks` and the newest `recent`. The
files of gates that the authors publish for their models can be read as they are. Keys stay at their true distance in
all heads, as in the published code.
"""

from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.full import Full
from streamjax.kv.heads import HeadGroups, far_heads, read_gates
from streamjax.kv.presets.registry import register
from streamjax.kv.sink import Sink
from streamjax.kv.window import Window

TRUE = 2**30  # a reach that no stream gets to: sinks at their true distance


@register(paper="DuoAttention: Efficient Long-Context LLM Inference, arXiv 2410.10819")
def duo_attention(
    heads: str = "", full: float = 0.5, sinks: int = 64, recent: int = 256, capacity: int = 16384
) -> tuple[Cache, ...]:
    """Keep everything in the heads of the file `heads` that retrieve, sinks and recent tokens in the others."""
    if not heads:
        raise ValueError("cache 'duo_attention' needs a file of head gates: heads=FILE.json or DuoAttention's own .tsv")
    everything, streaming = Cascade(Full(capacity)), Cascade(Sink(sinks, reach=TRUE), Window(recent))
    layers = far_heads(read_gates(heads), full)
    return tuple(HeadGroups((far, everything), (near, streaming)) for far, near in layers)
