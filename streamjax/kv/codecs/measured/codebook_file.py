"""`LayerCodebooks`: the codebooks of a whole model, fitted to a text, in a file (CQ, Zhang et al., 2405.03917)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from streamjax.checkpoints.measured_files import MeasuredLayers
from streamjax.kv.codecs.measured.coupled import Codebooks


@dataclasses.dataclass(frozen=True)
class LayerCodebooks(MeasuredLayers[Codebooks]):
    """What `sj.measure_codebooks` has measured; `save` writes it, and the preset takes the file (`codebooks=FILE`)."""

    kind = "codebooks of coupled channels"
    what = "codebooks"
    otherwise = "it has no codebooks of keys and values"
    ends = (".keys", ".values")
    tables = "codebooks"
    card = (
        "Of each layer, of each head's keys before rotation and of its values, codebooks of channels side by side, "
        "fitted by k-means to a text; for the cache preset cq of streamjax (CQ, arXiv 2405.03917), and for this "
        "model alone."
    )

    @staticmethod
    def tables_of(layer: Codebooks) -> Sequence[np.ndarray]:
        return layer.array("k"), layer.array("v")

    @staticmethod
    def layer_of(tables: Sequence[np.ndarray], model: str) -> Codebooks:
        keys, values = tables
        return Codebooks(keys.tobytes(), values.tobytes(), keys.shape[1], model)
