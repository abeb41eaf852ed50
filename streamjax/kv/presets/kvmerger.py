"""KVMerger (Wang et al., arXiv 2407.08454): tokens join the neighbour that is most like them, by a Gaussian kernel.

The published rule, for the end of a prompt: runs of neighbouring tokens with similar keys are merging sets; in each the
token with the most attention is the pivot, and keys and values of the set are averaged with Gaussian weights of their
keys' distance from the pivot's. How much is saved depends on a threshold. Here sizes are fixed: the `size` tokens with
the most attention are the pivots, a token joins the pivot before or behind it in the stream, and one whose key is less
alike than `threshold` is dropped, where the paper keeps it. Keys are averaged rotated, as they are stored, and stand at
the pivot's position. In a stream this happens after every `every` tokens, however it is cut.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.merging.kvmerger import Gaussian
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.h2o import H2O
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(
    paper="Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks, arXiv 2407.08454"
)
def kvmerger(window: int = 512, size: int = 448, threshold: float = 0.75, every: int = 64) -> Cascade:
    """Keep the newest `window` tokens and `size` pivots in each head, which take in neighbours that are like them."""
    return Cascade(Window(window), Scored(size, H2O(), every=every, merge=Gaussian(threshold=threshold)))
