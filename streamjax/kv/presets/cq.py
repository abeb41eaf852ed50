"""CQ (Zhang et al., arXiv 2405.03917): every token, channels side by side as one entry of a codebook.

The published rule: 2, 4 or 8 channels of a head share a code of 8 bits or so, 1 to 4 bits a channel, whose codebook is
fitted by k-means to the keys (before rotation) and the values of 16 texts; tokens weigh by the squares of the loss's
gradients at them; the newest tokens stay as they are. Here codes have 8, 4, 2 or 1 bits. `codebooks` names the file
that `sj.measure_codebooks(model, ids, by_gradients=True).save(FILE)` writes, which says how many channels are coupled;
`bits` is that of its codes. Without `by_gradients` all tokens weigh the same.
"""

from pathlib import Path

from streamjax.field_checks import Size
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.integers import Bits
from streamjax.kv.codecs.measured.codebook_file import LayerCodebooks
from streamjax.kv.codecs.measured.coupled import CQ, Codebooks
from streamjax.kv.layer_caches.current_chunk import CurrentChunk
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.window import Window


@register(
    paper="KV Cache is 1 Bit Per Channel: Efficient LLM Inference with Coupled Quantization, arXiv 2405.03917",
    needs=("codebooks",),
)
def cq(codebooks: str | Path = "", bits: Bits = 8, window: Size = 128, capacity: Size = 4096) -> tuple[Cache, ...]:
    """Keep every token up to `capacity`, those behind the window as entries of the codebooks in a file."""
    if not codebooks:
        raise ValueError("cache 'cq' needs codebooks=FILE: sj.measure_codebooks(model, ids).save(FILE) writes it")

    def cache(layer: Codebooks | tuple[str, int]) -> Cache:
        if isinstance(layer, Codebooks):
            return Cascade(Window(window), Full(capacity, codec=CQ(layer.coupled, bits, layer)))
        kind, bound = layer
        return CurrentChunk(bound) if kind == "chunk" else Cascade(Window(bound - 1))

    return tuple(map(cache, LayerCodebooks.load(codebooks).layers))
