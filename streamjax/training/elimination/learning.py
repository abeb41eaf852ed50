"""How predictors learn which blocks of tokens are informative (Jenga, section 4.3).

The model is frozen, and layers do not wait for each other's gradients: one pass over a batch trains the predictor of
every layer on the way. The loss is the squared distance to the scores of pairs of blocks, as a share of their squares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from streamjax.models.block import Block
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import SequenceContext
from streamjax.models.mixers.handed_on.learned_bounds import with_bounds
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.training.elimination.config import LeMoConfig
from streamjax.training.elimination.informativeness import block_scores, last_seeing, pair_scores, seeing
from streamjax.training.elimination.kept_tokens import highest
from streamjax.training.elimination.predictors import Predictor, draw_predictor, guessed_pairs
from streamjax.training.elimination.predictors_file import LayerPredictor, LayerPredictors

Trained = tuple[Predictor, Any]  # and the state of its optimizer


class PredictorStep(NamedTuple):
    """What a step measured before it changed the predictors, on the mean over layers.

    loss: squared distance to the scores, as a share of their squares. found: of the blocks that a layer would compute,
    the share that the predictor names.
    """

    loss: float
    found: float


def why_whole(block: BlockConfig) -> str | None:
    """Why a layer computes all tokens whatever is asked for; None where it need not."""
    mixer = block.mixer
    if not isinstance(mixer, AttentionConfig):
        return type(mixer).__name__
    if mixer.bound is not None:
        return mixer.bound[0]
    if mixer.alibi_slopes:
        return "alibi"  # its distances are those of indices
    return None if isinstance(block.mlp, DenseConfig) and block.beside is None else "mixed"


class PredictorTraining:
    """The predictors of a model while they learn.

    Args:
      model: stays as it is.
      config: how.
      seed: of the first weights.

    Raises:
      ValueError: every layer computes all tokens anyway.
    """

    def __init__(self, model: Decoder, config: LeMoConfig, seed: int = 0):
        draw, self._model, self._config = np.random.default_rng(seed), model, config
        self._layers: list[Trained | tuple[str, int]] = []
        for block in model.config.blocks:
            whole = model.config.hsa or model.config.stream_width > model.config.d_model
            why = "memory" if whole else why_whole(block)
            if why is not None:
                self._layers.append((why, 0))
                continue
            begun = draw_predictor(draw, model.config.d_model, config.width, config.channels)
            self._layers.append((begun, config.optimizer.init(begun)))
        if not any(isinstance(layer[0], Predictor) for layer in self._layers):
            raise ValueError("no layer of the model attends to all that stands before it: set lemo.share to 1.0")
        self._scores: list[list[np.ndarray]] = [[] for _ in self._layers]
        self._tokens = 0

    def steps(self, batches: Iterable[Mapping[str, np.ndarray | Array]]) -> Iterator[PredictorStep]:
        """Learn from each batch: tokens, and positions and segment_ids where rows are packed."""
        for batch in batches:
            yield self._step({name: jnp.asarray(batch[name]) for name in _READ if name in batch})

    def _step(self, batch: dict[str, Array]) -> PredictorStep:
        tokens = batch["tokens"]
        model, (x, context) = with_bounds(self._model), _embedded(self._model, batch)
        measured = []
        for i, layer in enumerate(self._layers):
            block = model.layer(i)
            if not isinstance(layer[0], Predictor):
                x = _passed(block, x, context)
                continue
            x, self._layers[i], scores, *told = _learn(block, x, context, layer, self._config)  # type: ignore[arg-type]
            self._scores[i].append(np.asarray(scores))
            measured.append(told)
        self._tokens += tokens.size
        loss, found = np.mean(np.array(jax.device_get(measured), np.float64), axis=0)
        return PredictorStep(float(loss), float(found))

    def result(self) -> LayerPredictors:
        """The predictors, and what all batches so far have scored."""

        def of_layer(layer: Sequence, scores: list[np.ndarray]) -> LayerPredictor | tuple[str, int]:
            if not isinstance(layer[0], Predictor):
                return (layer[0], layer[1])
            return LayerPredictor.of(layer[0], np.concatenate([x.ravel() for x in scores]), self._config.block)

        layers = tuple(map(of_layer, self._layers, self._scores))
        return LayerPredictors(layers, fingerprint_in_any_dtype(self._model), self._tokens)


_READ = ("tokens", "positions", "segment_ids")


@jax.jit
def _embedded(model: Decoder, batch: dict[str, Array]) -> tuple[Float[Array, "B T E"], SequenceContext]:
    tokens = batch["tokens"]
    position = jnp.broadcast_to(batch.get("positions", jnp.arange(tokens.shape[1])), tokens.shape)
    context = SequenceContext(position.astype(jnp.uint32), batch.get("segment_ids"), tokens.shape[1])
    return model.embed(tokens), context


@jax.jit
def _passed(block: Block, x: Float[Array, "B T E"], context: SequenceContext) -> Float[Array, "B T E"]:
    return block.parallel(x, context)[0]


@partial(jax.jit, static_argnames="config")
def _learn(
    block: Block, x: Float[Array, "B T E"], context: SequenceContext, trained: Trained, config: LeMoConfig
) -> tuple[Float[Array, "B T E"], Trained, Float[Array, "B N"], Float[Array, ""], Float[Array, ""]]:
    """One layer: its output, its predictor behind a step, blocks' scores, the loss before it, and what was found."""
    said = block.mixer_input(x)
    q, k, _ = block.attention.project(said, context)
    last = last_seeing(x.shape[0], x.shape[1], config.block, context.segment_ids)
    sees = seeing(last)
    pairs = pair_scores(q, k, config.block, block.attention.config.softmax_scale, context.segment_ids)

    def loss(predictor: Predictor) -> Float[Array, ""]:
        off = jnp.where(sees, guessed_pairs(predictor, said, config.block) - pairs, 0.0)
        return jnp.sum(jnp.square(off)) / jnp.maximum(jnp.sum(jnp.square(pairs)), 1e-9)

    def update(trained: Trained, _: None) -> tuple[Trained, Float[Array, ""]]:
        value, slope = jax.value_and_grad(loss)(trained[0])
        change, moments = config.optimizer.update(slope, trained[1], trained[0])
        return (optax.apply_updates(trained[0], change), moments), value  # type: ignore[return-value]

    scores = block_scores(pairs, sees)
    guesses = block_scores(guessed_pairs(trained[0], said, config.block), sees)
    found = share_found(guesses, scores, config.share)
    trained, losses = jax.lax.scan(update, trained, length=config.updates)
    return block.parallel(x, context)[0], trained, scores, losses[0], found


def share_found(guesses: Float[Array, "B N"], scores: Float[Array, "B N"], share: float) -> Float[Array, ""]:
    """Of the `share` of blocks with the highest scores, the part that is among those with the highest guesses."""
    count = max(1, round(share * scores.shape[1]))
    rows = jnp.arange(scores.shape[0])[:, None]

    def named(x: Array) -> Int32[Array, "B N"]:
        return jnp.zeros(x.shape, jnp.int32).at[rows, highest(x, count)].set(1)

    return jnp.sum(named(guesses) & named(scores)) / (count * scores.shape[0])
