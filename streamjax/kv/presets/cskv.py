"""CSKV (Wang et al., arXiv 2409.10593): every token, older ones with fewer channels of keys and values.

The published rule: the weights of keys and of values become two factors each, from a singular value decomposition, and
are trained to give the same keys and values, layer by layer; what lies between the factors is cached, keys before
rotation, beside the newest 32 tokens in full. Here nothing is trained by descent: `sj.measure_factors(model, ids)`
solves that problem on the given text, whose answer is the principal directions of keys and values, over all heads of a
layer. `factors` names its file. Without one each stream takes the directions of its own first `group` tokens, as
ShadowKV takes those of a prompt; `sj.compact` takes those of all that is laid out. The paper's quantisation of the
coordinates is not here.
"""

from pathlib import Path

from streamjax.field_checks import Fraction, Size
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.channels.factor_file import LayerFactors
from streamjax.kv.channels.low_rank import Factors, LowRank
from streamjax.kv.layer_caches.current_chunk import CurrentChunk
from streamjax.kv.presets.registry import register
from streamjax.kv.tiers.window import Window


@register(paper="CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios, arXiv 2409.10593")
def cskv(
    factors: str | Path = "",
    keys: Fraction = 0.5,
    values: Fraction = 0.5,
    window: Size = 32,
    group: Size = 512,
    capacity: Size = 4096,
) -> Cascade | tuple[Cache, ...]:
    """Keep every token up to `capacity`, and of older ones the shares `keys` and `values` of channels in a basis."""

    def cascade(own: Factors | None) -> Cascade:
        return Cascade(Window(window), LowRank(capacity, keys, values, group, own))

    def cache(layer: Factors | tuple[str, int]) -> Cache:
        if isinstance(layer, Factors):
            return cascade(layer)
        kind, bound = layer
        return CurrentChunk(bound) if kind == "chunk" else Cascade(Window(bound - 1))

    return tuple(map(cache, LayerFactors.load(factors).layers)) if factors else cascade(None)
