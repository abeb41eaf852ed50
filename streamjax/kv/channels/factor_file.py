"""`LayerFactors`: the directions of keys and values of a whole model, in a file (CSKV, Wang et al., 2409.10593)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from streamjax.checkpoints.measured_files import load_layers, save_layers
from streamjax.kv.channels.low_rank import Factors

_KIND = "low-rank factors"


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
        save_layers(
            path,
            [
                {".keys": layer.array("k"), ".values": layer.array("v")} if isinstance(layer, Factors) else layer
                for layer in self.layers
            ],
            kind=_KIND,
            model=self.model,
            tokens=self.tokens,
            card="Of each layer the directions of its keys before rotation and of its values, over all key heads "
            "together, that hold most of their squares on a text; for the cache preset cskv of streamjax (CSKV, arXiv "
            "2409.10593), and for this model alone.",
        )

    @classmethod
    def load(cls, path: str | Path) -> LayerFactors:
        """What `save` wrote.

        Raises:
          ValueError: no such file, or another one; one line that names it.
        """
        found, model, tokens = load_layers(
            path,
            (".keys", ".values"),
            kind=_KIND,
            what="factors of keys and values",
            otherwise="it has no low-rank factors",
            tables="factors",
        )
        layers = [
            x if isinstance(x, tuple) else Factors(x[0].tobytes(), x[1].tobytes(), len(x[0]), model) for x in found
        ]
        return cls(tuple(layers), model, tokens)
