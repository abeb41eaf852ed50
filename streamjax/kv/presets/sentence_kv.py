"""SentenceKV (Zhu et al., arXiv 2504.00970): sentences of the context, found by the means of their keys.

The published rule: a prompt is cut into sentences at its punctuation; a sentence is represented, for each head, by the
mean of its keys; the tokens that an observation window at the prompt's end attends to least are dropped; the others go
to the host's memory; in decoding, the mean query of the sentence that is being written loads the sentences that fit it
best, up to a budget of tokens.

What differs here: sentences end behind a token of `ends`, in prefill and in decoding alike, or at `page` tokens; no
token is dropped, and all lie on the device, until a sentence leaves as the oldest in `capacity` slots; each token
chooses with its own query, or `block` neighbouring ones by what one of them wants most, `top_k` sentences for each key
head, whatever their lengths. The newest `window` tokens and the first `sinks` are always read. The default `ends` are
the full stop, the question and the exclamation mark and the end of a line in the byte tokenizer; with another tokenizer
name its ids. In one word: `sentence_kv:ends=13+30+0`.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.pages.boundaries import EndTokens
from streamjax.kv.pages.indexes import Mean
from streamjax.kv.presets.registry import at_most, dividing, pages, register
from streamjax.kv.tiers.content_pages import ContentPages
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window

BYTE_ENDS = tuple(b".!?\n")


@register(
    paper="SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching, arXiv 2504.00970",
    page=dividing("page"),
    top_k=at_most("top_k", pages),
)
def sentence_kv(
    sinks: int = 4, window: int = 64, capacity: int = 131072, page: int = 128, top_k: int = 32,
    ends: tuple[int, ...] = BYTE_ENDS, least: int = 1, block: int = 1,
) -> Cascade:  # fmt: skip
    """Keep tokens in sentences, which end behind the ids `ends`, in `capacity` slots; read the best `top_k`."""
    pages = ContentPages(page, capacity, top_k, EndTokens(ends, least), Mean(), block)
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window), pages)
