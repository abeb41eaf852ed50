"""`LayerRetainingHeads`: the trained networks of a whole model, in a file (Locret, Huang et al., 2410.01805)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from streamjax.checkpoints.measured_files import load_layers, save_layers
from streamjax.kv.scores.retaining import RetainingHeads

_KIND = "retaining heads"


@dataclasses.dataclass(frozen=True)
class LayerRetainingHeads:
    """What `python -m train.retaining_heads` has trained; the preset locret takes the file (`retaining=FILE`).

    layers: of each layer its heads, or ("window", W) or ("chunk", C) where the model itself bounds what it sees.
    model: a fingerprint of the model's weights. tokens: how many were read in training.
    """

    layers: tuple[RetainingHeads | tuple[str, int], ...]
    model: str
    tokens: int

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata is the card."""
        save_layers(
            path,
            [
                dict(zip((".inward", ".outward"), layer.matrices, strict=True))
                if isinstance(layer, RetainingHeads)
                else layer
                for layer in self.layers
            ],
            kind=_KIND,
            model=self.model,
            tokens=self.tokens,
            card="Retaining heads (Locret, arXiv 2410.01805): of each layer two matrices that make of a token's "
            "queries, keys and values, before rotation, the attention logit that it is expected to get at most; for "
            "the cache preset locret of streamjax, and for this model alone.",
        )

    @classmethod
    def load(cls, path: str | Path) -> LayerRetainingHeads:
        """What `save` wrote.

        Raises:
          ValueError: no such file, or another one; one line that names it.
        """
        found, model, tokens = load_layers(
            path,
            (".inward", ".outward"),
            kind=_KIND,
            what="retaining heads",
            otherwise="it has no retaining heads",
            tables="retaining heads",
        )
        layers = []
        for i, x in enumerate(found):
            if not isinstance(x, tuple) and x[0].shape[1] != x[1].shape[0]:
                shapes = f"{x[0].shape} and {x[1].shape}"
                raise ValueError(f"{path}: no retaining heads could be read: layer {i} has matrices of {shapes}")
            layers.append(x if isinstance(x, tuple) else RetainingHeads.of(x[0], x[1], model))
        return cls(tuple(layers), model, tokens)
