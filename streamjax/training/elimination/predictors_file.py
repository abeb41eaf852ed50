"""`LayerPredictors`: the predictors of a whole model and what was seen of its scores, in a file (LeMo, 2501.09767)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from streamjax.checkpoints.measured_files import MeasuredLayers
from streamjax.models.decoder import Decoder
from streamjax.training.elimination.kept_tokens import TokenElimination
from streamjax.training.elimination.predictors import Predictor

_LEVELS = 257


@dataclasses.dataclass(frozen=True)
class LayerPredictor:
    """A layer's predictor, for blocks of `block` tokens, and the quantiles of what these scored, as shares of the mean.

    quantiles: [1, 257], from the lowest score to the highest.
    """

    predictor: Predictor
    quantiles: np.ndarray
    block: int

    @classmethod
    def of(cls, predictor: Predictor, scores: np.ndarray, block: int) -> LayerPredictor:
        """With the quantiles of scores of any shape."""
        values = scores.ravel() / max(float(np.mean(scores)), np.finfo(np.float32).tiny)
        return cls(predictor, np.quantile(values, np.linspace(0, 1, _LEVELS))[None].astype(np.float32), block)

    def share_above(self, threshold: float) -> float:
        """The share of the layer's blocks that scored more than `threshold` times their mean."""
        return 1.0 - float(np.interp(threshold, self.quantiles[0], np.linspace(0, 1, self.quantiles.shape[1])))


@dataclasses.dataclass(frozen=True)
class LayerPredictors(MeasuredLayers[LayerPredictor]):
    """What a run with `lemo.share` below 1 has trained before its first step; `lemo.predictors` takes the file.

    Layers that compute all tokens, such as those with a window, have none.
    """

    kind = "token predictors"
    what = "token predictors"
    otherwise = "it has no token predictors"
    ends = (*(f".{side}{i}" for side in ("queries", "keys") for i in range(3)), ".quantiles", ".block")
    tables = "predictors"
    card = (
        "Token predictors (LeMo, arXiv 2501.09767): of each layer two networks of three matrices that make of its "
        "input how informative blocks of tokens are to it; for fine-tuning this model with streamjax."
    )

    @staticmethod
    def tables_of(layer: LayerPredictor) -> Sequence[np.ndarray]:
        matrices = [np.asarray(matrix, np.float32) for network in layer.predictor for matrix in network]
        return [*matrices, layer.quantiles, np.full((1, 1), layer.block, np.float32)]

    @staticmethod
    def layer_of(tables: Sequence[np.ndarray], model: str) -> LayerPredictor:
        *matrices, quantiles, block = tables
        width, channels = matrices[1].shape[0], matrices[2].shape[1]
        wanted = [(matrices[0].shape[0], width), (width, width), (width, channels)] * 2
        if [matrix.shape for matrix in matrices] != wanted or block.shape != (1, 1) or block[0, 0] < 1:
            raise ValueError(f"matrices of {', '.join(str(matrix.shape) for matrix in matrices)}")
        networks = (tuple(map(jnp.asarray, part)) for part in (matrices[:3], matrices[3:]))
        return LayerPredictor(Predictor(*networks), quantiles, int(block[0, 0]))  # type: ignore[arg-type]

    def shares(self, share: float, equal: bool = False) -> tuple[float, ...]:
        """The share of its blocks that each layer computes, `share` on the mean over layers with a predictor.

        A layer's threshold is the mean score of its blocks (Jenga, algorithm 1, step 1) times one number for all
        layers, the one that leaves so many blocks. Where `equal` every layer computes the same share.
        """
        layers = [layer for layer in self.layers if isinstance(layer, LayerPredictor)]

        def above(threshold: float) -> float:
            return float(np.mean([layer.share_above(threshold) for layer in layers]))

        low, high = 0.0, max(float(layer.quantiles.max()) for layer in layers)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if above(middle) > share else (low, middle)

        def of_layer(layer: LayerPredictor | tuple[str, int]) -> float:
            if isinstance(layer, tuple):
                return 1.0
            return share if equal or share == 1 else layer.share_above(low)

        return tuple(map(of_layer, self.layers))

    def elimination(self, model: Decoder, share: float, equal: bool = False) -> TokenElimination:
        """What `loss_and_grad` takes, in the model's layout of layers.

        Raises:
          ValueError: predictors of another model.
        """
        layers = [None if isinstance(layer, tuple) else layer for layer in self.layers]
        found = [layer for layer in layers if layer is not None]
        channels = {layer.predictor.queries[0].shape[0] for layer in found}
        if len(layers) != model.config.num_layers or channels != {model.config.d_model}:
            raise ValueError(
                f"token predictors of {len(layers)} layers with {max(channels, default=0)} channels are not for a "
                f"model of {model.config.num_layers} layers with {model.config.d_model}"
            )
        stacked, period = model.stacked_layers, len(model.stack)
        predictors = [None if layer is None else layer.predictor for layer in layers]

        def stack(position: int) -> Predictor | None:
            rows = predictors[position:stacked:period]
            whole = [row for row in rows if row is not None]
            return jax.tree.map(lambda *matrices: jnp.stack(matrices), *whole) if len(whole) == len(rows) else None

        return TokenElimination(
            stack=tuple(stack(position) for position in range(period)),
            layers=tuple(predictors[stacked:]),
            shares=self.shares(share, equal),
            block=found[0].block,
        )
