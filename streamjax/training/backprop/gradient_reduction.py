"""Chunked backprop on a mesh: rows of a batch on different devices, gradients summed over devices once a step.

Left to the compiler, a sum of gradients over chunks would cross the devices at every chunk. Here the axes that split
the batch (data, fsdp and expert) are taken by hand (`jax.shard_map`), as in the distributed form of StreamBP
(2506.03077, section 3.4): each device sums over its own rows and all chunks, and what it has is reduced when a layer is
done, by a reduce-scatter where fsdp splits the parameter. Experts stay where they are and see the tokens of all devices
along expert (`models/mlps/expert_parallel.py`). Other axes, such as tensor, stay with the compiler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from streamjax.attention.sharded import CONTEXT
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import with_layers
from streamjax.parallel.rules import axes_of, constrain, free_spec, partition_spec
from streamjax.training.backprop.trainable_parameters import is_parameter
from streamjax.training.objectives.objective import Batch

Tree = TypeVar("Tree")
# What the devices along `context` have each: of sequences, or of the layers, of which they are given a part or all.
Shared = Literal["stretches", "stages", "branches"]


@dataclasses.dataclass(frozen=True)
class Split:
    """The dimensions of a parameter that mesh axes split, counted from the last one (-1); None: not split.

    expert, context: each device keeps its own part, and the gradient of that part is complete along this axis.
    """

    fsdp: int | None = None
    expert: int | None = None
    context: int | None = None


class Reduction:
    """How parameters that are split over mesh axes become whole, and gradients of whole ones become split.

    Args:
      axes: mesh axes over which the batch is split; without any nothing has to be done.
    """

    def __init__(self, axes: tuple[str, ...] = ()):
        self.axes = axes

    def gather(self, params: Tree, split: Tree) -> Tree:
        """Parameters whole along fsdp. `split` has a `Split` for each."""
        if not self.axes:
            return params

        def whole(x: Array, split: Split) -> Array:
            return x if split.fsdp is None else jax.lax.all_gather(x, "fsdp", axis=x.ndim + split.fsdp, tiled=True)

        return jax.tree.map(whole, params, split)

    def reduce(self, grads: Tree, split: Tree) -> Tree:
        """Sums of gradients over the devices, split as the parameters are."""
        if not self.axes:
            return grads

        def total(x: Array, split: Split) -> Array:
            if split.fsdp is not None:
                x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=x.ndim + split.fsdp, tiled=True)
            others = tuple(axis for axis in self.axes if getattr(split, axis, None) is None)
            return jax.lax.psum(x, others) if others else x

        return jax.tree.map(total, grads, split)

    def sum(self, x: Float[Array, ""]) -> Float[Array, ""]:
        """The sum of a number over the devices."""
        return jax.lax.psum(x, self.axes) if self.axes else x


def over_rows(
    compute: Callable[..., tuple[Array, Decoder]],
    model: Decoder,
    batch: Batch,
    prepared: Batch,
    trained: Decoder,
    together: int = 1,
    shared: Shared | None = None,
) -> tuple[Float[Array, ""], Decoder]:
    """`compute(model, batch, prepared, split, reduction)`, by hand over the axes of the mesh that split the batch.

    Args:
      compute: gives the loss of its rows, summed by the reduction, and the gradient, split as the parameters are.
      model, batch, prepared: whole.
      trained: the parameters that get a gradient.
      together: consecutive rows that must lie on one device, because the loss is a sum over groups of so many.
      shared: what is by hand along `context` too. Each device along it gets its rows whole, and works on its stretch of
        them, or is a stage. Then it has a part of the stacked layers, whose gradients it returns, or takes its own of
        all layers. None: the axis is the compiler's.
    """
    mesh, rows = jax.sharding.get_abstract_mesh(), batch["tokens"].shape[0]
    axes = () if mesh.empty or rows % together else batch_axes(mesh, rows // together)
    if not axes and shared is None:
        return compute(model, batch, prepared, None, Reduction())
    rows_axes, axes = axes, (*axes, *([CONTEXT] if shared else []))
    split = split_dimensions(model, mesh, axes)
    if shared == "stages":
        split = _staged(model, split)

    def specs(tree: Decoder) -> Decoder:
        return jax.tree.map(lambda x, split: _spec(x.ndim, split), tree, keep_like(split, tree))

    def row_specs(arrays: Batch) -> dict[str, PartitionSpec]:
        split_rows = {name: x.ndim > 0 and x.shape[0] == rows for name, x in arrays.items()}
        return {
            name: PartitionSpec(rows_axes) if is_split else PartitionSpec() for name, is_split in split_rows.items()
        }

    manual = jax.shard_map(
        lambda model, batch, prepared: compute(model, batch, prepared, split, Reduction(axes)),
        mesh=mesh,
        axis_names=set(axes),
        in_specs=(specs(model), row_specs(batch), row_specs(prepared)),
        out_specs=(PartitionSpec(), specs(trained)),
        check_vma=False,
    )
    loss, grads = manual(model, batch, prepared)
    return loss, as_parameters(grads) if shared == "stages" else grads


def batch_axes(mesh: AbstractMesh, rows: int) -> tuple[str, ...]:
    """The mesh axes that split a batch of `rows` rows, without those that `jax.shard_map` took by hand."""
    return axes_of(free_spec(("batch",), (rows,), mesh)[0])


def split_dimensions(model: Decoder, mesh: AbstractMesh, axes: tuple[str, ...]) -> Decoder:
    """For every parameter the dimensions that `axes` split; shaped as the model."""

    def dimensions(variable: nnx.Variable) -> nnx.Variable:
        spec = partition_spec(variable.get_metadata("axes"), variable.shape, mesh)
        found = {axis: dim - len(spec) for dim, entry in enumerate(spec) for axis in axes_of(entry) if axis in axes}
        return jax.tree.map(lambda _: Split(**found), variable)

    return jax.tree.map(dimensions, model, is_leaf=is_parameter)


def as_parameters(tree: Tree) -> Tree:
    """Gradients where their parameters lie: gathered here, and not within `jax.shard_map`, where the compiler would
    gather them along its own axes too."""

    def placed(variable: nnx.Variable) -> nnx.Variable:
        return jax.tree.map(lambda x: constrain(x, *variable.get_metadata("axes")), variable)

    return jax.tree.map(placed, tree, is_leaf=is_parameter)


def _staged(model: Decoder, split: Decoder) -> Decoder:
    """`split` with stacked layers split along `context` too."""

    def stage(x: Array, split: Split) -> Split:
        return dataclasses.replace(split, context=-x.ndim)

    stack = [jax.tree.map(stage, block, own) for block, own in zip(model.stack, split.stack, strict=True)]
    return with_layers(split, stack, list(split.layers))


def keep_like(tree: Tree, other: Tree) -> Tree:
    """`tree` with None where `other`, otherwise of the same shape, has None."""
    leaf = lambda node: node is None or is_parameter(node)  # noqa: E731
    return jax.tree.map(lambda like, x: None if like is None else x, other, tree, is_leaf=leaf)


def _spec(ndim: int, split: Split) -> PartitionSpec:
    entries: list[str | None] = [None] * ndim
    for axis, dim in dataclasses.asdict(split).items():
        if dim is not None:
            entries[ndim + dim] = axis
    return PartitionSpec(*entries)
