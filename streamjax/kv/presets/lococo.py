"""LoCoCo (Cai et al., arXiv 2406.05317): what a full cache drops flows into some of its slots, by a convolution.

The published rule: behind every chunk the tokens with the most attention stay; of the others and of what was merged
before, a convolution over their keys and values makes a weight for each token and each of a fixed number of slots,
blended with the slot's own token. The convolutions are trained on the text's loss while the model is frozen, or with
it. `kernels` names their file (`python -m train.convolutions` writes it), which says how many slots of the
`size` they fill. Here a choice is made after every `every` tokens, by the attention of as many queries, behind a window
of whole tokens; keys come together rotated, at the position of the slot's own token, as in the published code.
"""

from pathlib import Path

from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.layer_caches.current_chunk import CurrentChunk
from streamjax.kv.merging.kernel_file import LayerKernels
from streamjax.kv.merging.lococo import Convolved, Kernels
from streamjax.kv.presets.registry import register
from streamjax.kv.scores.snapkv import SnapKV
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window


@register(paper="LoCoCo: Dropping In Convolutions for Long Context Compression, arXiv 2406.05317", needs=("kernels",))
def lococo(kernels: str | Path = "", window: int = 64, size: int = 896, every: int = 64) -> tuple[Cache, ...]:
    """Keep the newest `window` tokens, and in each head `size` others, of which a convolution fills some slots."""

    def cache(layer: Kernels | tuple[str, int]) -> Cache:
        if isinstance(layer, Kernels):
            if layer.slots > size:
                raise ValueError(f"lococo: the kernels fill {layer.slots} slots, and size is {size}: it must be larger")
            return Cascade(Window(window), Scored(size, SnapKV(every, 1), every=every, merge=Convolved(kernels=layer)))
        kind, bound = layer
        return CurrentChunk(bound) if kind == "chunk" else Cascade(Window(bound - 1))

    if not kernels:
        raise ValueError("lococo needs trained convolutions: give kernels=FILE (train.convolutions)")
    return tuple(map(cache, LayerKernels.load(kernels).layers))
