"""`LayerKernels`: the trained convolutions of a whole model, in a file (LoCoCo, Cai et al., 2406.05317)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from streamjax.checkpoints.measured_files import MeasuredLayers
from streamjax.kv.merging.lococo import Kernels


@dataclasses.dataclass(frozen=True)
class LayerKernels(MeasuredLayers[Kernels]):
    """What `streamjax.training.heads.convolutions` has trained; the preset lococo takes the file (`kernels=FILE`)."""

    kind = "merging convolutions"
    what = "merging convolutions"
    otherwise = "it has no merging convolutions"
    ends = (".kernel", ".bias", ".blend")
    tables = "convolutions"
    card = (
        "LoCoCo (arXiv 2406.05317): of each layer a convolution over the keys and values of tokens that a cache "
        "cannot keep, which says how much of each goes to which slot; for the cache preset lococo of streamjax, and"
        " for this model alone."
    )

    @staticmethod
    def tables_of(layer: Kernels) -> Sequence[np.ndarray]:
        kernel, bias, blend = layer.weights
        return kernel.reshape(-1, kernel.shape[2]), bias[None], np.full((1, 1), blend, np.float32)

    @staticmethod
    def layer_of(tables: Sequence[np.ndarray], model: str) -> Kernels:
        kernel, bias, blend = tables
        slots = bias.shape[1]
        if len(kernel) % slots or bias.shape[0] != 1 or blend.size != 1:
            raise ValueError(f"tables of {kernel.shape}, {bias.shape} and {blend.shape}")
        return Kernels.from_arrays(kernel.reshape(slots, -1, kernel.shape[1]), bias[0], float(blend[0, 0]), model)
