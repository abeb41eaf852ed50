"""`LayerRetainingHeads`: the trained networks of a whole model, in a file (Locret, Huang et al., 2410.01805)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from streamjax.checkpoints.measured_files import MeasuredLayers
from streamjax.kv.scores.retaining import RetainingHeads


@dataclasses.dataclass(frozen=True)
class LayerRetainingHeads(MeasuredLayers[RetainingHeads]):
    """What `python -m train.retaining_heads` has trained; the preset locret takes the file (`retaining=FILE`)."""

    kind = "retaining heads"
    what = "retaining heads"
    otherwise = "it has no retaining heads"
    ends = (".inward", ".outward")
    tables = "retaining heads"
    card = (
        "Retaining heads (Locret, arXiv 2410.01805): of each layer two matrices that make of a token's queries, "
        "keys and values, before rotation, the attention logit that it is expected to get at most; for the cache "
        "preset locret of streamjax, and for this model alone."
    )

    @staticmethod
    def tables_of(layer: RetainingHeads) -> Sequence[np.ndarray]:
        return layer.arrays

    @staticmethod
    def layer_of(tables: Sequence[np.ndarray], model: str) -> RetainingHeads:
        inward, outward = tables
        if inward.shape[1] != outward.shape[0]:
            raise ValueError(f"matrices of {inward.shape} and {outward.shape}")
        return RetainingHeads.from_arrays(inward, outward, model=model)
