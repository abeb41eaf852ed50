"""`LayerCodebooks`: the codebooks of a whole model, fitted to a text, in a file (CQ, Zhang et al., 2405.03917)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from streamjax.checkpoints.measured_files import load_layers, save_layers
from streamjax.kv.codecs.measured.coupled import Codebooks

_KIND = "codebooks of coupled channels"


@dataclasses.dataclass(frozen=True)
class LayerCodebooks:
    """What `sj.measure_codebooks` has measured; `save` writes it, and the preset takes the file (`codebooks=FILE`).

    layers: of each layer its codebooks, or ("window", W) or ("chunk", C) where the model itself bounds what it sees.
    model: a fingerprint of the model's weights. tokens: how many were measured.
    """

    layers: tuple[Codebooks | tuple[str, int], ...]
    model: str
    tokens: int

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata is the card."""
        save_layers(
            path,
            [
                {".keys": layer.array("k"), ".values": layer.array("v")} if isinstance(layer, Codebooks) else layer
                for layer in self.layers
            ],
            kind=_KIND,
            model=self.model,
            tokens=self.tokens,
            card="Of each layer, of each head's keys before rotation and of its values, codebooks of channels side by "
            "side, fitted by k-means to a text; for the cache preset cq of streamjax (CQ, arXiv 2405.03917), and for "
            "this model alone.",
        )

    @classmethod
    def load(cls, path: str | Path) -> LayerCodebooks:
        """What `save` wrote.

        Raises:
          ValueError: no such file, or another one; one line that names it.
        """
        found, model, tokens = load_layers(
            path,
            (".keys", ".values"),
            kind=_KIND,
            what="codebooks",
            otherwise="it has no codebooks of keys and values",
            tables="codebooks",
        )
        layers = [
            x if isinstance(x, tuple) else Codebooks(x[0].tobytes(), x[1].tobytes(), x[0].shape[1], model)
            for x in found
        ]
        return cls(tuple(layers), model, tokens)
