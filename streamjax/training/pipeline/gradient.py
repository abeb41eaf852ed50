"""The gradient of a batch whose microbatches go through the stages of a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import accumulator
from streamjax.models.config import DenseConfig
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import with_layers, without_layers
from streamjax.models.mixers.attention import SequenceContext
from streamjax.parallel.rules import STAGE
from streamjax.training.backprop.embedding_and_head import default_logits_chunk
from streamjax.training.backprop.gradient_reduction import batch_axes
from streamjax.training.backprop.head.whole_sequence import whole_sequence_loss
from streamjax.training.backprop.trainable_parameters import Trainable, combine, partition
from streamjax.training.objectives.objective import Batch, CrossEntropy, Objective, require_no_prefix
from streamjax.training.pipeline.paths import WHOLE, PipelineConfig
from streamjax.training.pipeline.schedule import Schedule, plan
from streamjax.training.pipeline.tables import Arrivals, Passes, Tables, tables_of

METHODS = ("full", "remat")
_BESIDE = ("data", "tensor")  # mesh axes that go together with stages


def pipeline_loss_and_grad(
    model: Decoder,
    batch: Mapping[str, Array | np.ndarray],
    microbatches: int,
    *,
    pipeline: PipelineConfig = WHOLE,
    method: str = "remat",
    objective: Objective | None = None,
    logits_chunk: int | None = None,
    trainable: Trainable = nnx.Param,
) -> tuple[Float[Array, ""], Decoder]:
    """Loss and gradient of a batch under a mesh with the axis `stage`: those of one device, but for rounding.

        with jax.set_mesh(make_mesh(stage=4, data=2)):
            loss, grads = pipeline_loss_and_grad(model, batch, microbatches=16)

    Each stage has an equal part of the stacked layers, and all have the embedding and the output. Where
    `pipeline.skip` is above 0, the loss is that of a model of which each microbatch sees its own path
    (`plan(...).paths`).

    Args:
      model: with stacked layers (`scan_layers`), as many times the period as the stages divide.
      batch: as for `loss_and_grad`.
      microbatches: into which the rows are dealt out, in turn.
      pipeline: what of the stages they go through.
      method: what a stage keeps while it computes its layers again: "full" all activations of a microbatch, "remat"
        the inputs of its layers.
      objective, logits_chunk, trainable: as for `loss_and_grad`; a separable objective.

    Raises:
      ValueError: a model or a batch that cannot be split so, another method, or a mesh with other axes.
    """
    objective = CrossEntropy() if objective is None else objective
    objective.check(batch, model.config.vocab_size)
    require_no_prefix(batch)
    mesh = jax.sharding.get_abstract_mesh()
    stages = check_pipeline(model, dict(mesh.shape), method, objective)
    rows = batch["tokens"].shape[0]
    if microbatches < 1 or rows % microbatches:
        raise ValueError(f"{rows} rows cannot be dealt out to {microbatches} microbatches")
    axes = batch_axes(mesh, rows // microbatches)
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}
    cut = {
        name: rearrange(x, "(b n) ... -> n b ...", n=microbatches)
        for name, x in {**arrays, **{f"prepared_{k}": x for k, x in objective.prepare(arrays).items()}}.items()
    }
    schedule = plan(stages, microbatches, pipeline)
    run = _Run(
        schedule,
        tables_of(schedule),
        objective,
        method == "remat",
        logits_chunk or default_logits_chunk(model, rows // microbatches),
        axes,
    )
    params, rest = partition(model, trainable)
    tables = run.tables
    by_stage = PartitionSpec(None, STAGE)
    manual = jax.shard_map(
        run,
        mesh=mesh,
        axis_names={STAGE, *axes},
        in_specs=(
            _specs(params),
            _specs(rest),
            jax.tree.map(lambda _: PartitionSpec(None, axes or None), cut),
            (by_stage, by_stage, PartitionSpec(None, None, STAGE), PartitionSpec(None, None, STAGE)),
        ),
        out_specs=(PartitionSpec(), _specs(params)),
        check_vma=False,
    )
    return manual(params, rest, cut, (tables.forward, tables.backward, tables.inputs.slots, tables.gradients.slots))


def check_pipeline(model: Decoder, axes: Mapping[str, int], method: str, objective: Objective) -> int:
    """The number of stages; ValueError for what a pipeline cannot train."""
    stages = axes.get(STAGE, 1)
    others = [name for name, size in axes.items() if size > 1 and name not in (STAGE, *_BESIDE)]
    if others:
        raise ValueError(f"mesh.{others[0]} is {axes[others[0]]}: stages of a pipeline go with data and tensor only")
    if method not in METHODS:
        raise ValueError(f"backprop.method {method!r} with mesh.stage {stages}: use {' or '.join(METHODS)}")
    config = model.config
    if len(model.layers) or not len(model.stack):
        raise ValueError(f"a pipeline of {stages} stages needs stacked layers, all of them: set scan_layers=True")
    if config.repeats % stages:
        raise ValueError(
            f"mesh.stage is {stages}, and the model repeats {config.period} layers {config.repeats} times: use a "
            "number of stages that divides that"
        )
    if config.bounded_layers:
        raise ValueError(f"mesh.stage is {stages}, and all layers share what bounds their decays: use other axes")
    if any(not isinstance(block.mlp, DenseConfig | None) for block in config.blocks):
        raise ValueError(f"mesh.stage is {stages}, and the model has experts: use the mesh axis expert")
    if not objective.separable or objective.rows != 1:
        raise ValueError(f"mesh.stage is {stages}, and {type(objective).__name__} takes rows together: use other axes")
    return stages


def _specs(tree: Decoder) -> Decoder:
    """Layers over stages, all else on each of them."""
    layers = jax.tree.map(lambda _: PartitionSpec(STAGE), list(tree.stack))
    ends = jax.tree.map(lambda _: PartitionSpec(), without_layers(tree))
    return with_layers(ends, layers, [])


@dataclasses.dataclass(frozen=True)
class _Run:
    """One stage's program, under `jax.shard_map`. axes: along which rows of a microbatch are split."""

    schedule: Schedule
    tables: Tables
    objective: Objective
    remat: bool
    logits_chunk: int
    axes: tuple[str, ...]

    def __call__(self, params: Decoder, rest: Decoder, cut: Batch, rows: tuple) -> tuple[Array, Decoder]:
        """Loss and gradient, of all stages and rows."""
        model = combine(params, rest)
        shape = *cut["tokens"].shape[1:], model.config.stream_width
        held = jnp.zeros((self.schedule.slots + 1, *shape), model.dtype)  # the last one for what is not wanted
        grads = jax.tree.map(jnp.zeros_like, params)
        start = jnp.zeros((), accumulator(model.dtype)), grads, held, held

        def tick(carry: tuple, row: tuple) -> tuple[tuple, None]:
            forward, backward, inputs, gradients = row
            loss, grads, kept, back = carry
            sent = self.forward(combine(params, rest), cut, _here(forward), kept)
            kept = self.receive(kept, sent, self.tables.inputs, inputs)
            loss, grads, sent = self.backward(params, rest, cut, _here(backward), kept, back, loss, grads)
            back = self.receive(back, sent, self.tables.gradients, gradients)
            return (loss, grads, kept, back), None

        loss, grads, *_ = jax.lax.scan(tick, start, rows)[0]
        everywhere = (STAGE, *self.axes)
        layers = list(grads.stack)
        if self.axes:
            layers = jax.lax.psum(layers, self.axes)
        ends = jax.lax.psum(without_layers(grads), everywhere)
        return jax.lax.psum(loss, everywhere), with_layers(ends, layers, [])

    def layers(self, model: Decoder, x: Float[Array, "B T E"], cut: Batch) -> Float[Array, "B T E"]:
        """This stage's layers."""
        position = cut.get("positions", jnp.arange(x.shape[1]))
        positions = jnp.broadcast_to(position, x.shape[:2]).astype(jnp.uint32)
        context = SequenceContext(positions, cut.get("segment_ids"), x.shape[1])

        def apply(block: Any, x: Array) -> Array:
            out: Array = block.parallel(x, context, None)[0]
            return out

        apply = jax.checkpoint(apply) if self.remat else apply

        def period(x: Array, blocks: tuple) -> tuple[Array, None]:
            for block in blocks:
                x = apply(block, x)
            return x, None

        return jax.lax.scan(period, x, tuple(model.stack))[0]

    def input(self, model: Decoder, part: Batch, do: Passes, kept: Array) -> Float[Array, "B T E"]:
        """What goes into this stage's layers: embeddings at the beginning of a path, else what has come."""
        return jax.lax.cond(
            do.first == 1, lambda: model.embed(part["tokens"]).astype(kept.dtype), lambda: kept[do.slot]
        )

    def forward(self, model: Decoder, cut: Batch, do: Passes, kept: Array) -> Float[Array, "B T E"]:
        """The output of a forward pass, or zeros."""

        def compute() -> Array:
            part = _microbatch(cut, do.microbatch)
            return self.layers(model, self.input(model, part, do, kept), part)

        return jax.lax.cond(do.microbatch >= 0, compute, lambda: jnp.zeros_like(kept[0]))

    def backward(
        self,
        params: Decoder,
        rest: Decoder,
        cut: Batch,
        do: Passes,
        kept: Array,
        back: Array,
        loss: Array,
        grads: Decoder,
    ) -> tuple[Array, Decoder, Float[Array, "B T E"]]:
        """Loss and gradients with those of a backward pass added, and the gradient of its input, or zeros."""
        ends, rest_ends = without_layers(params), without_layers(rest)

        def compute() -> tuple[Array, Decoder, Array]:
            part = _microbatch(cut, do.microbatch)
            x = self.input(combine(params, rest), part, do, kept)
            y, pull = jax.vjp(
                lambda stack, x: self.layers(combine(with_layers(ends, stack, []), rest), x, part),
                list(params.stack),
                x,
            )
            d_ends = without_layers(grads)

            def at_the_end() -> tuple[Array, Decoder, Array]:
                value, (more, d_y) = jax.value_and_grad(
                    lambda ends, y: self.loss(combine(ends, rest_ends), y, part), argnums=(0, 1)
                )(ends, y)
                return loss + value, jax.tree.map(jnp.add, d_ends, more), d_y

            total, d_ends, d_y = jax.lax.cond(do.last == 1, at_the_end, lambda: (loss, d_ends, back[do.slot]))
            d_stack, d_x = pull(d_y)

            def at_the_beginning() -> Decoder:
                _, pull_tokens = jax.vjp(lambda ends: combine(ends, rest_ends).embed(part["tokens"]), ends)
                return jax.tree.map(jnp.add, d_ends, pull_tokens(d_x)[0])

            d_ends = jax.lax.cond(do.first == 1, at_the_beginning, lambda: d_ends)
            d_stack = jax.tree.map(jnp.add, list(grads.stack), d_stack)
            return total, with_layers(d_ends, d_stack, []), d_x

        return jax.lax.cond(do.microbatch >= 0, compute, lambda: (loss, grads, jnp.zeros_like(kept[0])))

    def loss(self, ends: Decoder, y: Float[Array, "B T E"], part: Batch) -> Float[Array, ""]:
        """What a microbatch adds to the loss."""
        prepared = {name.removeprefix("prepared_"): x for name, x in part.items() if name.startswith("prepared_")}
        return whole_sequence_loss(ends, ends.norm(y), prepared, self.objective, self.logits_chunk)

    def receive(self, held: Array, sent: Array, arrivals: Arrivals, slots: Int32[Array, "N 1"]) -> Array:
        """What the stage holds, with what other stages have sent in its place."""
        size = self.schedule.stages
        for place, distance in enumerate(arrivals.distances):
            found = jax.lax.ppermute(sent, STAGE, [(i, (i + distance) % size) for i in range(size)])
            held = jax.lax.dynamic_update_index_in_dim(held, found, slots[place, 0], 0)
        return held


def _here(passes: Passes) -> Passes:
    """This stage's column of a tick's row."""
    return Passes(*(x[0] for x in passes))


def _microbatch(cut: Batch, index: Any) -> dict[str, Array]:
    return {name: jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for name, x in cut.items()}
