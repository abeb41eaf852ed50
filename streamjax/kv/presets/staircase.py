"""A staircase (after ProGQ and other schedules by age): the older a token, the fewer bits it keeps, then it is gone.

No one paper's rule: published schedules drop the precision of tokens as they age, by layers of their own choice; here
tiers say it. What falls from 8 bits into 4 has been coded twice. With sinks it is StreamingLLM with most of its window
in codes, for streams without end.
"""

from streamjax.field_checks import Count, Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.integers import Int
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.sink import Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453, in steps of fewer bits",
    grows=("window", "eight", "four"),
)
def staircase(sinks: Size = 4, window: Size = 64, eight: Count = 448, four: Count = 1536, group: Size = 64) -> Cascade:
    """Keep `sinks` and the newest `window` tokens as they are, `eight` older ones in 8 bits and `four` in 4 bits."""
    by_bits = (eight, Int(8, group=group)), (four, Int(4, group=group))
    steps = [Window(size, codec=codec) for size, codec in by_bits if size]
    return Cascade(Sink(sinks), Window(window), *steps)
