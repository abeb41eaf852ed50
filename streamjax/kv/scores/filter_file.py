"""`QueryFilters`: the filters of a whole model, measured on a text, in a file (Q-Filters, Godey et al., 2503.02812)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from streamjax.checkpoints import user_path
from streamjax.checkpoints.measured_files import measured_file
from streamjax.kv.scores.query_filters import Filters


@dataclasses.dataclass(frozen=True)
class QueryFilters:
    """What `sj.measure_filters` has measured; `save` writes it, and the preset takes the file (`filters=FILE`).

    layers: of each layer its filters, or ("window", W) or ("chunk", C) where the model itself bounds what it sees.
    model: a fingerprint of the model's weights. tokens: how many were measured.
    """

    layers: tuple[Filters | tuple[str, int], ...]
    model: str
    tokens: int

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata is the card."""
        arrays = {str(i): layer.array.copy() for i, layer in enumerate(self.layers) if isinstance(layer, Filters)}
        own = [None if isinstance(layer, Filters) else list(layer) for layer in self.layers]
        about = {
            "kind": "query filters",
            "model": self.model,
            "tokens": str(self.tokens),
            "layers": json.dumps(own),
            "card": "Q-Filters (arXiv 2503.02812): of each layer and key head the direction of its queries, from "
            "their singular value decomposition; for the cache preset qfilters of streamjax, and for this model alone.",
        }
        save_file(arrays, user_path(path), metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> QueryFilters:
        """What `save` wrote.

        Raises:
          ValueError: no such file, or another one; one line that names it.
        """
        with measured_file(path, "query filters", "filters of queries", "it has no filters of queries") as (
            file,
            about,
        ):
            model, tokens, own = about["model"], int(about["tokens"]), json.loads(about["layers"])
            layers: list[Filters | tuple[str, int]] = []
            for i, layer in enumerate(own):
                if layer is not None:
                    layers.append((str(layer[0]), int(layer[1])))
                    continue
                array = np.ascontiguousarray(file.get_tensor(str(i)), np.float32)
                if array.ndim != 2 or not array.size or not np.isfinite(array).all():
                    raise ValueError(f"the filters of layer {i} are no table of numbers")
                layers.append(Filters(array.tobytes(), len(array), model))
            return cls(tuple(layers), model, tokens)
