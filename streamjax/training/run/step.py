"""One training step, one evaluation step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from streamjax.models.decoder import Decoder
from streamjax.models.mlps.routing_report import RoutingReport
from streamjax.parallel.rules import STAGE
from streamjax.streaming.state import StreamState
from streamjax.training.backprop.loss_and_grad import Batch, check_method, loss_and_grad, loss_sum
from streamjax.training.backprop.routing import routing_metrics, take_reports, trainable_and_reports, with_reports
from streamjax.training.backprop.streaming_loss import streaming_loss, streaming_loss_and_grad
from streamjax.training.backprop.trainable_parameters import Trainable, combine, is_parameter, partition
from streamjax.training.distillation.alignment import alignment_loss_and_grad
from streamjax.training.elimination.kept_tokens import TokenElimination
from streamjax.training.objectives.distillation import Distillation
from streamjax.training.objectives.objective import CrossEntropy
from streamjax.training.pipeline.gradient import pipeline_loss_and_grad
from streamjax.training.pipeline.paths import WHOLE, PipelineConfig
from streamjax.training.run.state import TrainState

Metrics = dict[str, Array]
_PIPELINED = ("method", "objective", "logits_chunk", "trainable")
_STREAMED = ("objective", "chunk_size", "logits_chunk", "trainable")


def accumulate_gradients(
    model: Decoder,
    batch: Mapping[str, Array | np.ndarray],
    microbatches: int,
    pipeline: PipelineConfig = WHOLE,
    **options: Any,
) -> tuple[Float[Array, ""], Decoder]:
    """`loss_and_grad` of a batch, cut into microbatches that exist one at a time.

    Each microbatch counts as its share of what the objective is a mean of, so that the result is that of the whole
    batch however the weights fall. Rows that the objective takes together, such as DPO's pairs, stay together. They
    are dealt out in turn: under a mesh each device keeps its own.

    Args:
      model: the model.
      batch: as for `loss_and_grad`; all its arrays have the rows as their first dimension.
      pipeline: how they go through the stages, under a mesh that has them (`pipeline_loss_and_grad`).
      microbatches: how many; they must divide the rows, or the groups of rows that the objective takes together.
      options: the other arguments of `loss_and_grad`, `objective`, `method` and so on; `aligned`, the layers of
        `Distillation(matches="layers")`, whose gradient is `alignment_loss_and_grad`'s.

    Raises:
      ValueError: rows that cannot be dealt out, and what `loss_and_grad` refuses.
    """
    if jax.sharding.get_abstract_mesh().shape.get(STAGE, 1) > 1:
        known = {name: options[name] for name in _PIPELINED if name in options}
        return pipeline_loss_and_grad(model, batch, microbatches, pipeline=pipeline, **known)
    objective, aligned = options.get("objective") or CrossEntropy(), options.pop("aligned", ())
    if isinstance(objective, Distillation) and objective.matches == "layers":
        trainable = options.get("trainable", nnx.Param)
        gradient = partial(alignment_loss_and_grad, layers=aligned, trainable=trainable)
    else:
        gradient = partial(loss_and_grad, **options)
        objective.check(batch, model.config.vocab_size)
    if microbatches == 1:
        return gradient(model, batch)
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}
    rows = arrays["tokens"].shape[0]
    if microbatches < 1 or rows % (objective.rows * microbatches):
        each = "" if objective.rows == 1 else f", {objective.rows} of them together for {type(objective).__name__}"
        raise ValueError(f"{rows} rows cannot be dealt out to {microbatches} microbatches{each}")
    total = objective.count(arrays)
    deal = {"n": microbatches, "r": objective.rows}
    cut = {name: rearrange(x, "(b n r) ... -> n (b r) ...", **deal) for name, x in arrays.items()}

    def add(sums: tuple[Array, Decoder], part: Batch) -> tuple[tuple[Array, Decoder], None]:
        share = jnp.where(total > 0, objective.count(part) / jnp.where(total > 0, total, 1.0), 0.0)

        def scaled(node: Any) -> Any:
            is_mean = not isinstance(node, RoutingReport)  # reports are sums
            return jax.tree.map(lambda x: x * share.astype(x.dtype), node) if is_mean else node

        found = jax.tree.map(scaled, gradient(model, part), is_leaf=is_parameter)
        return jax.tree.map(jnp.add, sums, found), None

    shapes = jax.eval_shape(gradient, model, {name: x[0] for name, x in cut.items()})
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, cut)[0]


def step_function(
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    trainable: Trainable = nnx.Param,
    spike_factor: float | None = None,
    **options: Any,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """What `make_train_step` compiles, for a caller who calls it inside of a program."""
    check_method(options.get("method", "full"))
    options = {**options, "trainable": trainable_and_reports(trainable)}
    reading = {name: options[name] for name in _STREAMED if name in options}

    def train_step(
        state: TrainState, batch: Batch, elimination: TokenElimination | None = None
    ) -> tuple[TrainState, Metrics]:
        stream, reporting = state.stream, with_reports(state.model)
        if stream is None:
            fewer: dict[str, Any] = {} if elimination is None else {"elimination": elimination}
            loss, grads = accumulate_gradients(reporting, batch, accumulation, **options, **fewer)
        elif accumulation == 1:
            loss, grads, stream = streaming_loss_and_grad(reporting, stream, batch, **reading)
        else:
            raise ValueError(f"accumulation is {accumulation}: streams are read in one piece, set it to 1")
        grads, reports = take_reports(grads)
        before, rest = partition(state.model, trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, before)
        params, norm, skips = optax.apply_updates(before, updates), optax.tree.norm(grads), state.skips
        metrics = {"loss": loss, "grad_norm": norm}
        if skips is not None:
            good, skips = skips.judge(loss, norm, spike_factor)
            old, new = (before, state.opt_state), (params, opt_state)
            params, opt_state = jax.tree.map(lambda x, y: jnp.where(good, x, y), new, old)
            metrics |= {"skipped_steps": skips.total, "skipped_in_a_row": skips.in_a_row}
        metrics["param_norm"] = optax.tree.norm(params)
        new_state = TrainState(combine(params, rest), opt_state, state.step + 1, stream, skips=skips)
        return new_state, metrics | routing_metrics(reports)

    return train_step


def make_train_step(
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    trainable: Trainable = nnx.Param,
    spike_factor: float | None = None,
    elimination: TokenElimination | None = None,
    **options: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted `(state, batch) -> (state, metrics)`; the state is donated.

    Metrics are the loss in nats per token, the global norm of the gradient before clipping, and that of the trained
    parameters after the step, float32 scalars: a norm that is not finite tells of any value that is not. For models
    with experts also what their routers did (`routing_metrics`). With a stream in the state the batch is read as its
    continuation (`streaming_loss_and_grad`). Where the state has `skips`, a step whose loss or gradient is not finite
    leaves weights and optimizer state as they are, and is counted.

    Args:
      optimizer: turns gradients into updates.
      accumulation: microbatches a step; 1 for streams.
      trainable: the type of parameters that are trained; all others stay as they are, bit for bit.
      spike_factor: where the state has `skips`, a gradient whose norm is above so many times the running mean is
        skipped, too.
      elimination: which tokens layers compute (LeMo); all where None.
      options: how `loss_and_grad` makes the gradient: its `method` and so on; for streams only `objective`,
        `chunk_size` and `logits_chunk` count.

    Raises:
      ValueError: an unknown method.
    """
    step = step_function(
        optimizer, accumulation=accumulation, trainable=trainable, spike_factor=spike_factor, **options
    )
    compiled = jax.jit(step, donate_argnums=0)
    return compiled if elimination is None else partial(compiled, elimination=elimination)


@jax.jit
def eval_step(model: Decoder, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of negative log-likelihoods in nats, and the sum of the weights."""
    return loss_sum(model, batch), CrossEntropy().count(batch)


@partial(jax.jit, static_argnames="chunk_size", donate_argnames="stream")
def streaming_eval_step(
    model: Decoder, stream: StreamState, batch: Batch, chunk_size: int | None = None
) -> tuple[StreamState, Float[Array, ""], Float[Array, ""]]:
    """The streams' state behind a batch, and what `eval_step` returns. The stream is donated."""
    loss, stream = streaming_loss(model, stream, batch, CrossEntropy(), chunk_size=chunk_size)
    total = CrossEntropy().count(batch)
    return stream, loss * total, total
