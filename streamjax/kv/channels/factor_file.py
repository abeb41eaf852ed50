"""`LayerFactors`: the directions of keys and values of a whole model, in a file (CSKV, Wang et al., 2409.10593)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from streamjax.checkpoints.measured_files import MeasuredLayers
from streamjax.kv.channels.low_rank import Factors


@dataclasses.dataclass(frozen=True)
class LayerFactors(MeasuredLayers[Factors]):
    """What `sj.measure_factors` has measured; `save` writes it, and the preset takes the file (`factors=FILE`)."""

    kind = "low-rank factors"
    what = "factors of keys and values"
    otherwise = "it has no low-rank factors"
    ends = (".keys", ".values")
    tables = "factors"
    card = (
        "Of each layer the directions of its keys before rotation and of its values, over all key heads together, "
        "that hold most of their squares on a text; for the cache preset cskv of streamjax (CSKV, arXiv "
        "2409.10593), and for this model alone."
    )

    @staticmethod
    def tables_of(layer: Factors) -> Sequence[np.ndarray]:
        return layer.array("k"), layer.array("v")

    @staticmethod
    def layer_of(tables: Sequence[np.ndarray], model: str) -> Factors:
        keys, values = tables
        return Factors(keys.tobytes(), values.tobytes(), len(keys), model)
