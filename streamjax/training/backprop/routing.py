"""What routers of experts need to know of a batch, and what they report of it, by every backprop order.

Their losses are means over a batch's tokens, whose number a layer that sees a chunk cannot know: `with_routing_total`.
What a router did is the gradient of a place for it (`mlps/routing_report.py`), so it is summed over chunks, devices and
microbatches as any gradient is: attach the places by `with_reports`, train `trainable_and_reports` of a type, and take
them out of the gradient by `take_reports`.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from streamjax.models.block import Block
from streamjax.models.config import ExpertsConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mlps.dense_and_experts import DenseAndExperts
from streamjax.models.mlps.experts import Experts
from streamjax.models.mlps.routing_report import Report, RoutingReport
from streamjax.training.backprop.trainable_parameters import Trainable

Model = TypeVar("Model", bound=Decoder)


def with_routing_total(model: Model, tokens: int | None) -> Model:
    """A model, or a tree shaped as one, whose routers' losses are means over `tokens` tokens; None: of each call."""
    parts = (getattr(block.mlp, "experts", block.mlp) for block in model.config.blocks)
    if not any(mlp.balance_loss or mlp.z_loss for mlp in parts if isinstance(mlp, ExpertsConfig)):
        return model
    copy, mlps = _copy(model)
    for mlp in mlps:
        mlp.routing_total = tokens
    return copy


def with_reports(model: Model) -> Model:
    """A model with a place for the report of each of its routers."""
    copy, mlps = _copy(model)
    for mlp in mlps:
        shape = (*mlp.router.shape[:-2], Report.size(mlp.config.num_experts))
        mlp.report = RoutingReport(jnp.zeros(shape, jnp.float32), axes=("router",))
    return copy


def trainable_and_reports(trainable: Trainable) -> Trainable:
    """The type of what is trained, and that of reports."""
    return (*trainable, RoutingReport) if isinstance(trainable, tuple) else (trainable, RoutingReport)


def take_reports(grads: Model) -> tuple[Model, dict[int, Float[Array, " S"]]]:
    """A gradient without its reports, and the reports by the index of their layer."""
    reports = {}
    for index in range(grads.config.num_layers):
        block, row = grads.layer_and_row(index)
        mlp = _experts(block)
        if mlp is not None and mlp.report is not None:
            reports[index] = mlp.report[...] if row is None else mlp.report[...][row]
    copy, mlps = _copy(grads)
    for mlp in mlps:
        mlp.report = nnx.data(None)
    return copy, reports


def routing_metrics(reports: dict[int, Float[Array, " S"]]) -> dict[str, Float[Array, ""]]:
    """Scalars of reports: the load of a layer is that of its busiest expert, 1 where all experts get the same.

    `expert_load` is the largest of the layers, `expert_load/3` that of layer 3; the routers' losses are means over
    layers, without their coefficients.
    """
    if not reports:
        return {}
    found = {index: Report.from_array(report) for index, report in reports.items()}
    load = {f"expert_load/{index}": report.load for index, report in found.items()}
    losses = {
        "router_balance_loss": jnp.mean(jnp.stack([report.balance_loss for report in found.values()])),
        "router_z_loss": jnp.mean(jnp.stack([report.z_loss for report in found.values()])),
    }
    return {"expert_load": jnp.max(jnp.stack(list(load.values()))), **losses, **load}


def _copy(model: Model) -> tuple[Model, list[Experts]]:
    """A copy of a model that shares its arrays, and the mixtures of experts in it."""
    leaves, structure = jax.tree.flatten(model)
    copy: Model = jax.tree.unflatten(structure, leaves)
    return copy, [mlp for block in (*copy.stack, *copy.layers) if (mlp := _experts(block)) is not None]


def _experts(block: Block) -> Experts | None:
    """The mixture of experts of a layer, or of a stack of layers; it may stand beside a dense MLP."""
    if isinstance(block.mlp, DenseAndExperts):
        return block.mlp.experts
    return block.mlp if isinstance(block.mlp, Experts) else None
