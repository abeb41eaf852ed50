"""`HeadProjections`: the trained directions of every head's keys and values, in a file (MatryoshkaKV, 2410.14731)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from streamjax.checkpoints.measured_files import MeasuredLayers
from streamjax.kv.channels.low_rank import Factors


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
class HeadProjections(MeasuredLayers[Projections]):
    """What `python -m train.projections` has trained; the preset matryoshka_kv takes the file (`projections=FILE`)."""

    kind = "projections of heads"
    what = "projections of heads"
    otherwise = "it has no projections of heads"
    ends = (".keys", ".values", ".ranks")
    tables = "projections"
    card = (
        "MatryoshkaKV (arXiv 2410.14731): of each layer and key head orthogonal directions of its keys before "
        "rotation and of its values, trained so that the first ones say most, and how many of them the head keeps; "
        "for the cache preset matryoshka_kv of streamjax, and for this model alone."
    )

    @staticmethod
    def tables_of(layer: Projections) -> Sequence[np.ndarray]:
        keys, values = (x.reshape(-1, x.shape[2]).astype(np.float32) for x in (layer.keys, layer.values))
        return keys, values, layer.ranks.astype(np.float32)

    @staticmethod
    def layer_of(tables: Sequence[np.ndarray], model: str) -> Projections:
        keys, values, ranks = tables
        heads, width = ranks.shape[1], keys.shape[1]
        shape = heads * width, width
        if keys.shape != shape or values.shape != shape or not ((ranks >= 1) & (ranks <= width)).all():
            raise ValueError(f"tables of {keys.shape}, {values.shape} and ranks of {heads} heads")
        cut = (heads, width, width)
        return Projections(keys.reshape(cut), values.reshape(cut), ranks.astype(np.int64))
