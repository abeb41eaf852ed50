"""Locret (Huang et al., arXiv 2410.01805): heads that are trained to say what of a stream will be asked for.

The published rule: in each layer a small network reads a token's queries, keys and values and says, for each key head,
the largest attention logit that the token will get. A prompt is read in chunks, behind each of which every head keeps
the tokens with the largest scores and the newest ones ("stabilizers"). Since the score is known when a token comes and
never changes, a stream decides as a prompt does. `retaining` names the file of trained networks, which
`python -m train.retaining_heads` writes. Here a choice is made after every `every` tokens, generated ones too, where
the paper keeps all that it generates, and the newest are a window. At compaction the tokens of `query` are scored.
"""

from pathlib import Path

from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.layer_caches.current_chunk import CurrentChunk
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.retaining import Retaining, RetainingHeads
from streamjax.kv.scores.retaining_file import LayerRetainingHeads
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(
    paper="Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads, arXiv 2410.01805",
    needs=("retaining",),
)
def locret(retaining: str | Path = "", window: int = 64, size: int = 896, every: int = 64) -> tuple[Cache, ...]:
    """Keep the newest `window` tokens, and in each head the `size` others that a trained network ranks highest."""

    def cache(layer: RetainingHeads | tuple[str, int]) -> Cache:
        if isinstance(layer, RetainingHeads):
            return Cascade(Window(window), Scored(size, Retaining(layer), every=every))
        kind, bound = layer
        return CurrentChunk(bound) if kind == "chunk" else Cascade(Window(bound - 1))

    if not retaining:
        raise ValueError("locret needs the file of a trained network: give retaining=FILE (train.retaining_heads)")
    return tuple(map(cache, LayerRetainingHeads.load(retaining).layers))
