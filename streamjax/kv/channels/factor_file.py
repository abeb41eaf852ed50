"""`LayerFactors`: the directions of keys and values of a whole model, in a file (CSKV, Wang et al., 2409.10593)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from streamjax.checkpoints import user_path
from streamjax.checkpoints.measured_files import measured_file
from streamjax.kv.channels.low_rank import Factors


@dataclasses.dataclass(frozen=True)
class LayerFactors:
    """What `sj.measure_factors` has measured; `save` writes it, and the preset takes the file (`factors=FILE`).

    layers: of each layer its factors, or ("window", W) or ("chunk", C) where the model itself bounds what it sees.
    model: a fingerprint of the model's weights. tokens: how many were measured.
    """

    layers: tuple[Factors | tuple[str, int], ...]
    model: str
    tokens: int

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata is the card."""
        arrays: dict[str, np.ndarray] = {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, Factors):
                arrays |= {f"{i}.keys": layer.array("k").copy(), f"{i}.values": layer.array("v").copy()}
        own = [None if isinstance(layer, Factors) else list(layer) for layer in self.layers]
        about = {
            "kind": "low-rank factors",
            "model": self.model,
            "tokens": str(self.tokens),
            "layers": json.dumps(own),
            "card": "Of each layer the directions of its keys before rotation and of its values, over all key heads "
            "together, that hold most of their squares on a text; for the cache preset cskv of streamjax (CSKV, arXiv "
            "2409.10593), and for this model alone.",
        }
        save_file(arrays, user_path(path), metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> LayerFactors:
        """What `save` wrote.

        Raises:
          ValueError: no such file, or another one; one line that names it.
        """
        otherwise = "it has no low-rank factors"
        with measured_file(path, "low-rank factors", "factors of keys and values", otherwise) as (file, about):
            model, tokens, own = about["model"], int(about["tokens"]), json.loads(about["layers"])
            layers: list[Factors | tuple[str, int]] = []
            for i, layer in enumerate(own):
                if layer is not None:
                    layers.append((str(layer[0]), int(layer[1])))
                    continue
                pair = [np.ascontiguousarray(file.get_tensor(f"{i}.{name}"), np.float32) for name in ("keys", "values")]
                if any(x.ndim != 2 or not x.size or not np.isfinite(x).all() for x in pair):
                    raise ValueError(f"the factors of layer {i} are no tables of numbers")
                layers.append(Factors(pair[0].tobytes(), pair[1].tobytes(), len(pair[0]), model))
            return cls(tuple(layers), model, tokens)
