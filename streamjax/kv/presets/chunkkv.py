"""ChunkKV (Liu et al., arXiv 2502.00299): chunks of neighbouring tokens stay or go as a whole.

The published rule, for the end of a prompt: the attention of the last `window` queries, all heads of a layer together,
is averaged over chunks of `chunk` tokens, the best chunks stay, and the window with them. `sj.compact` with this cache
is that rule. In a stream a choice is made after every `every` tokens, and a chunk that has gone is gone. The paper lets
neighbouring layers share a choice to save time; here each layer has its own.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.chunkkv import ChunkKV
from streamjax.kv.scores.snapkv import SnapKV
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="ChunkKV: Semantic-Preserving KV Cache Compression, arXiv 2502.00299")
def chunkkv(window: int = 30, size: int = 900, chunk: int = 10, every: int = 60) -> Cascade:
    """Keep the newest `window` tokens, and `size` others in whole chunks that the last queries attend to most."""
    score = ChunkKV(SnapKV(window, kernel=1), chunk)
    return Cascade(Window(window), Scored(size, score, per_head=False, every=every))
