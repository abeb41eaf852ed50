"""RetroInfer (Chen et al., arXiv 2505.02922): clusters of keys; the best are read, the next are estimated.

The published rule: the first tokens and the newest 64 are always read (the steady zone); the keys of all others are
clustered, for each key head, in segments of 8,192 tokens, by spherical k-means with a centroid for every 16 tokens. A
query ranks the clusters by their centroids, attends to the tokens of the best 1.8% of them (the retrieval zone), takes
the mean key, the summed value and the size of the next 23.2% for theirs (the estimation zone), and leaves out the rest.
The sizes below are these shares of 131,072 tokens, and a smaller capacity has the same shares of its own. Here
everything lies on the device: there is no buffer that brings clusters from the host's memory (the paper's wave buffer).
Segments fill as the stream goes on, in prefill and in
decoding alike (the published code clusters a prompt at once after full attention, and then every 1,024 tokens:
`segment=1024`); the open one is read as a whole, and the oldest goes beyond `capacity`. Clusters of more than `most`
tokens are cut in pieces, each with a centroid of its own. In a prefill, which the paper does with full attention,
`block` neighbouring queries choose together; with `block=1` each chooses for itself, at several times the work. A
decoding step has one query. Drafts that are verified side by side choose together too, unless `block=1`.
"""

from streamjax.kv.cascade import Cascade
from streamjax.kv.presets.registry import Rule, at_most, dividing, register
from streamjax.kv.tiers.clusters import Clusters
from streamjax.kv.tiers.sink import TRUE_DISTANCE, Sink
from streamjax.kv.tiers.window import Window


def _share(option: str, published: int) -> Rule:
    """The share of the clusters that `published` ones are of 131,072 tokens."""
    return at_most(option, lambda options: round(published / 8192 * options["capacity"] / max(1, options["size"])))


@register(
    paper="RetroInfer: A Vector-Storage Approach for Scalable Long-Context LLM Inference, arXiv 2505.02922",
    segment=dividing("segment"),
    retrieve=_share("retrieve", 150),
    estimate=_share("estimate", 1900),
)
def retro_infer(
    sinks: int = 4, window: int = 64, capacity: int = 131072, segment: int = 8192, retrieve: int = 150,
    estimate: int = 1900, size: int = 16, most: int = 32, iterations: int = 10, block: int = 16,
) -> Cascade:  # fmt: skip
    """Keep the newest `capacity` tokens in clusters; read the best `retrieve`, estimate the next by their means."""
    clusters = Clusters(segment, capacity, retrieve, estimate, size, most, iterations, block)
    return Cascade(Sink(sinks, reach=TRUE_DISTANCE), Window(window), clusters)
