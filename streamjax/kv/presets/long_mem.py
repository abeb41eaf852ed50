"""LongMem (Wang et al., arXiv 2306.07174): a bank of old keys and values, which a trained side network reads.

The published rule: a frozen model reads segments of 1,024 tokens, and one of its layers leaves its keys and values in a
bank of 65,536 tokens, in chunks of 4. A side network of half the layers reads the segment beside it; in one of its
layers a query finds in the bank, by mean keys, the 16 chunks that fit best, attends to their 64 tokens, and a gate of
each head mixes that with what it sees of the segment. Logits are the side network's.

`sj.with_side_network(model, FILE)` gives a model its side network (`python -m train.side_network`), and this cache its
bank. The stream is not cut into segments: each layer has sinks and a window, and what leaves the window goes to the
bank. Within a chunk what leaves the window meanwhile is seen from the next chunk on, so cuts play a small part, as
segments do there. Query heads that share a key head choose together, and all tokens of the bank stand `distance`
positions behind a query, where the paper's model has no rotation to ask for one. Without a side network there is no
bank: what is left is `streaming_llm`.
"""

from streamjax.field_checks import Size
from streamjax.kv.cascade import Cascade
from streamjax.kv.pages.indexes import Mean
from streamjax.kv.presets.registry import at_most, dividing, pages, register
from streamjax.kv.tiers.bank import Bank
from streamjax.kv.tiers.sink import Sink
from streamjax.kv.tiers.window import Window


@register(
    paper="Augmenting Language Models with Long-Term Memory, arXiv 2306.07174",
    page=dividing("page"),
    top_k=at_most("top_k", pages),
)
def long_mem(sinks: Size = 4, window: Size = 508, capacity: Size = 65536, page: Size = 4, top_k: Size = 16) -> Cascade:
    """Keep sinks and a window; a side network, if given, reads the `top_k` best pages of `capacity` old tokens."""
    bank = Bank(page, capacity, top_k, Mean(), distance=window)
    return Cascade(Sink(sinks, reach=sinks + window), Window(window), bank)
