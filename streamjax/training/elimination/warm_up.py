"""Predictors of a run, before its first step: read from a file, or trained and written to one (LeMo, 2501.09767)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from streamjax.checkpoints import user_path
from streamjax.models.decoder import Decoder
from streamjax.training.elimination.config import LeMoConfig
from streamjax.training.elimination.learning import PredictorTraining
from streamjax.training.elimination.predictors_file import LayerPredictor, LayerPredictors

_log = logging.getLogger(__name__)


def trained_or_read(
    model: Decoder, batches: Iterator[Mapping[str, Any]], config: LeMoConfig, file: Path, seed: int
) -> LayerPredictors:
    """Predictors from `config.predictors`, from `file` where an earlier start wrote them, or trained and written there.

    So a run that goes on has those that it began with.

    Args:
      model: before its first step.
      batches: of the run; they are read only where predictors are trained.
      config: of the run.
      file: in its workdir.
      seed: of the first weights.

    Raises:
      ValueError: a file that cannot be read, or one for other blocks; several processes without a file; data that
        ends, or a loss that is not finite.
    """
    given = config.predictors if config.predictors is not None else file if file.exists() else None
    if given is not None:
        found = LayerPredictors.load(given)
        blocks = {layer.block for layer in found.layers if isinstance(layer, LayerPredictor)}
        if blocks != {config.block}:
            raise ValueError(
                f"{user_path(given)} is for blocks of {max(blocks, default=0)} tokens: set lemo.block to it"
            )
        return found
    if jax.process_count() > 1:
        raise ValueError(
            "lemo.predictors is none, and one process alone trains them: begin a run of one process, and "
            f"give its {file.name}"
        )
    training = PredictorTraining(model, config, seed)
    every, done = max(1, config.steps // 10), 0
    for done, step in enumerate(training.steps(batches), 1):
        if not math.isfinite(step.loss):
            raise ValueError(f"the predictors' loss is not finite at batch {done}: lower lemo.learning_rate")
        if done % every == 0 or done == config.steps:
            _log.info(
                "predictors, batch %d of %d: loss %.3f, %.0f%% of the blocks found",
                done, config.steps, step.loss, 100 * step.found,
            )  # fmt: skip
    if not done:
        raise ValueError("the data ends before the predictors have learnt from a batch")
    found, written = training.result(), file.with_suffix(".partial")
    found.save(written)
    written.replace(file)
    return found
