"""`HeadProjections`: the trained directions of every head's keys and values, in a file (MatryoshkaKV, 2410.14731)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from streamjax.checkpoints.measured_files import load_layers, save_layers
from streamjax.kv.channels.low_rank import Factors

_KIND = "projections of heads"


@dataclasses.dataclass(frozen=True, eq=False)
class Projections:
    """Of one layer. keys, values: orthogonal, the best direction first. ranks: how many each head keeps, [2, K]."""

    keys: Float[np.ndarray, "K D D"]
    values: Float[np.ndarray, "K D D"]
    ranks: Int[np.ndarray, "2 K"]

    def factors(self, model: str, shares: tuple[float, float]) -> tuple[Factors, tuple[float, float]]:
        """Directions over all heads, those of each head in its own channels, and which share of the channels they are.

        Args:
          model: a fingerprint of the model.
          shares: of each head's channels, for keys and for values; where 0, `ranks` says it.
        """
        found, parts = [], []
        for whole, share, searched in zip((self.keys, self.values), shares, self.ranks, strict=True):
            heads, width = whole.shape[:2]
            ranks = np.full(heads, max(1, round(share * width))) if share else searched
            columns = -(-int(ranks.sum()) // heads) * heads  # slots have as many numbers in the place of each head
            table, at = np.zeros((heads, width, columns), np.float32), 0
            for head, rank in enumerate(ranks):
                table[head, :, at : at + rank] = whole[head, :, :rank]
                at += rank
            found.append(table.reshape(heads * width, columns).tobytes())
            parts.append(columns / (heads * width))
        return Factors(found[0], found[1], self.keys.shape[0] * self.keys.shape[1], model), (parts[0], parts[1])


@dataclasses.dataclass(frozen=True, eq=False)
class HeadProjections:
    """What `python -m train.projections` has trained; the preset matryoshka_kv takes the file (`projections=FILE`).

    layers: of each layer its projections, or ("window", W) or ("chunk", C) where the model itself bounds what it sees.
    model: a fingerprint of the model's weights. tokens: how many were read in training.
    """

    layers: tuple[Projections | tuple[str, int], ...]
    model: str
    tokens: int

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata is the card."""
        save_layers(
            path,
            [
                {
                    ".keys": layer.keys.reshape(-1, layer.keys.shape[2]).astype(np.float32),
                    ".values": layer.values.reshape(-1, layer.values.shape[2]).astype(np.float32),
                    ".ranks": layer.ranks.astype(np.float32),
                }
                if isinstance(layer, Projections)
                else layer
                for layer in self.layers
            ],
            kind=_KIND,
            model=self.model,
            tokens=self.tokens,
            card="MatryoshkaKV (arXiv 2410.14731): of each layer and key head orthogonal directions of its keys before "
            "rotation and of its values, trained so that the first ones say most, and how many of them the head keeps; "
            "for the cache preset matryoshka_kv of streamjax, and for this model alone.",
        )

    @classmethod
    def load(cls, path: str | Path) -> HeadProjections:
        """What `save` wrote.

        Raises:
          ValueError: no such file, or another one; one line that names it.
        """
        found, model, tokens = load_layers(
            path,
            (".keys", ".values", ".ranks"),
            kind=_KIND,
            what="projections of heads",
            otherwise="it has no projections of heads",
            tables="projections",
        )
        layers: list[Projections | tuple[str, int]] = []
        for i, x in enumerate(found):
            if isinstance(x, tuple):
                layers.append(x)
                continue
            keys, values, ranks = x
            heads, width = ranks.shape[1], keys.shape[1]
            shape = heads * width, width
            if keys.shape != shape or values.shape != shape or not ((ranks >= 1) & (ranks <= width)).all():
                shapes = f"{keys.shape}, {values.shape} and ranks of {heads} heads"
                raise ValueError(f"{path}: no projections of heads could be read: layer {i} has tables of {shapes}")
            cut = (heads, width, width)
            layers.append(Projections(keys.reshape(cut), values.reshape(cut), ranks.astype(np.int64)))
        return cls(tuple(layers), model, tokens)
