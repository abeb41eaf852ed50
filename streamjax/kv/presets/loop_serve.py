"""LoopServe (Li et al., arXiv 2507.13681): each turn reads the lines of attention that matter to it.

The published rule, for the prompt of each turn: some of its queries are asked what they attend to; for each head
vertical and slash lines are taken, those with most attention first, until they hold a share of it; the turn's queries
read these lines and nothing else. While an answer is written, the tokens of a budget are chosen again every few tokens
by the attention of the newest ones.

Here a line is a key, or a band of neighbouring distances, which XLA reads as one run of keys; query heads that share a
key head share its lines, the queries that are asked are evenly spread, and every query reads its own chunk in full. A
turn of several chunks chooses for each chunk. The budget of an answer is `sj.Session(reselect=)`: a small cache, laid
out anew every few tokens of all that the stream holds (streamjax/streaming/compacting/reselecting.py).
"""

from streamjax.field_checks import Fraction, Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import register
from streamjax.kv.selective.lines import Lines


@register(
    paper="LoopServe: An Adaptive Dual-phase LLM Inference Acceleration System for Multi-Turn Dialogues, "
    "arXiv 2507.13681"
)
def loop_serve(
    capacity: Size = 65536, share: Fraction = 0.95, sample: Size = 32, band: Size = 64, least: Size = 1024
) -> Cascade:
    """Keep every token up to `capacity`; a chunk reads the keys and distances that hold a `share` of attention."""
    return Cascade(Lines(capacity, share=share, sample=sample, band=band, least=least))
