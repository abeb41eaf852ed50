"""`LayerKernels`: the trained convolutions of a whole model, in a file (LoCoCo, Cai et al., 2406.05317)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from streamjax.checkpoints.measured_files import load_layers, save_layers
from streamjax.kv.merging.lococo import Kernels

_KIND = "merging convolutions"


@dataclasses.dataclass(frozen=True)
class LayerKernels:
    """What `streamjax.training.heads.convolutions` has trained; the preset lococo takes the file (`kernels=FILE`).

    layers: of each layer its kernels, or ("window", W) or ("chunk", C) where the model itself bounds what it sees.
    model: a fingerprint of the model's weights. tokens: how many were read in training.
    """

    layers: tuple[Kernels | tuple[str, int], ...]
    model: str
    tokens: int

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata is the card."""
        tables = []
        for layer in self.layers:
            if isinstance(layer, Kernels):
                kernel, bias, blend = layer.weights
                rows = kernel.reshape(-1, kernel.shape[2])
                tables.append({".kernel": rows, ".bias": bias[None], ".blend": np.full((1, 1), blend, np.float32)})
            else:
                tables.append(layer)  # type: ignore[arg-type]
        save_layers(
            path,
            tables,
            kind=_KIND,
            model=self.model,
            tokens=self.tokens,
            card="LoCoCo (arXiv 2406.05317): of each layer a convolution over the keys and values of tokens that a "
            "cache cannot keep, which says how much of each goes to which slot; for the cache preset lococo of "
            "streamjax, and for this model alone.",
        )

    @classmethod
    def load(cls, path: str | Path) -> LayerKernels:
        """What `save` wrote.

        Raises:
          ValueError: no such file, or another one; one line that names it.
        """
        found, model, tokens = load_layers(
            path,
            (".kernel", ".bias", ".blend"),
            kind=_KIND,
            what="merging convolutions",
            otherwise="it has no merging convolutions",
            tables="convolutions",
        )
        layers: list[Kernels | tuple[str, int]] = []
        for i, x in enumerate(found):
            if isinstance(x, tuple):
                layers.append(x)
                continue
            kernel, bias, blend = x
            slots = bias.shape[1]
            if len(kernel) % slots or bias.shape[0] != 1 or blend.size != 1:
                shapes = f"{kernel.shape}, {bias.shape} and {blend.shape}"
                raise ValueError(f"{path}: no merging convolutions could be read: layer {i} has tables of {shapes}")
            layers.append(Kernels.of(kernel.reshape(slots, -1, kernel.shape[1]), bias[0], float(blend[0, 0]), model))
        return cls(tuple(layers), model, tokens)
