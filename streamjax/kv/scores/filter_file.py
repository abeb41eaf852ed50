"""`QueryFilters`: the filters of a whole model, measured on a text, in a file (Q-Filters, Godey et al., 2503.02812)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from streamjax.checkpoints.measured_files import load_layers, save_layers
from streamjax.kv.scores.query_filters import Filters

_KIND = "query filters"


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
        save_layers(
            path,
            [{"": layer.array} if isinstance(layer, Filters) else layer for layer in self.layers],
            kind=_KIND,
            model=self.model,
            tokens=self.tokens,
            card="Q-Filters (arXiv 2503.02812): of each layer and key head the direction of its queries, from "
            "their singular value decomposition; for the cache preset qfilters of streamjax, and for this model alone.",
        )

    @classmethod
    def load(cls, path: str | Path) -> QueryFilters:
        """What `save` wrote.

        Raises:
          ValueError: no such file, or another one; one line that names it.
        """
        found, model, tokens = load_layers(
            path,
            ("",),
            kind=_KIND,
            what="filters of queries",
            otherwise="it has no filters of queries",
            tables="filters",
        )
        layers = [x if isinstance(x, tuple) else Filters(x[0].tobytes(), len(x[0]), model) for x in found]
        return cls(tuple(layers), model, tokens)
