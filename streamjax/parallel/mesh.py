"""Device meshes, and the placement of models, optimizer states and streams on them.

`make_mesh` names the devices' axes, `streamjax.parallel.rules` maps logical dimensions to those axes, and `shardings`
applies that table to whole trees. Computation follows its arrays: run it under `jax.set_mesh(mesh)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from streamjax.parallel.rules import RULES, STAGE, NamedState, partition_spec

Tree = TypeVar("Tree")


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    expert: int = 1,
    replica: int = 1,
    stage: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of devices: the axes data, fsdp, context and tensor; expert, stage and replica where they are asked for.

    Args:
      data: rows of a batch are split; parameters are repeated.
      fsdp: rows are split and so are parameters and optimizer state, which are gathered where they are used.
      tensor: heads, MLP channels and the vocabulary are split.
      context: the sequence, and the slots of a KV cache, are split.
      expert: rows are split, and so are the experts of a mixture; other parameters are repeated.
      stage: stacked layers are split, and microbatches go through them one after the other (`training.pipeline`).
      replica: whole models that are trained apart (`TrainConfig.diloco`); rows are split.
      devices: the devices of the mesh; all of this run's where None.

    One size may be -1: the devices that the other axes leave.

    Raises:
      ValueError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    if expert != 1:
        sizes = {**sizes, "expert": expert}
    if stage != 1:
        sizes = {STAGE: stage, **sizes}
    if replica != 1:
        sizes = {"replica": replica, **sizes}  # outermost: the devices of a replica lie together
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {name} is {size}: use a positive size, or -1 for the devices that are left")
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"mesh axes {' and '.join(rest)} are both -1: only one can take the devices that are left")
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if rest:
        sizes[rest[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices) or 0 in sizes.values():
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 and name not in rest)
        raise ValueError(
            f"a mesh of {shape or 'one device'} does not fit {len(devices)} devices: make the sizes multiply to "
            f"{len(devices)}, set one of them to -1, or pass fewer devices"
        )
    # Eight devices along an axis are half of a dimension, or one and a half, of a torus of 4 x 4 x 4.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


class RowShare(NamedTuple):
    """A process has number `part` of the `parts` equal parts of a batch's rows."""

    part: int
    parts: int


def row_shares(
    mesh: Mesh | None, process_of: Callable[[jax.Device], int] = lambda device: device.process_index
) -> dict[int, RowShare]:
    """Which rows of a batch each process reads, by its number.

    Rows lie over the mesh axes of `batch` alone. Processes whose devices differ along another axis, such as `tensor`
    or `context`, have the same rows, and must read the same ones.

    Raises:
      ValueError: the rows of two processes overlap and are not the same, or some have more of them.

    Example:
      >>> mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
      >>> row_shares(mesh, process_of=lambda device: device.id)[1]
      RowShare(part=0, parts=2)
    """
    if mesh is None:
        return {jax.process_index(): RowShare(0, 1)}
    names = [name for name in RULES["batch"] if name in mesh.shape]
    order = [mesh.axis_names.index(name) for name in names]
    sizes = [mesh.shape[name] for name in names]
    rows: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        row = int(np.ravel_multi_index([place[axis] for axis in order], sizes))
        rows.setdefault(process_of(device), set()).add(row)
    parts = sorted({tuple(sorted(own)) for own in rows.values()})
    every = [row for part in parts for row in part]
    if len(every) != len(set(every)) or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"the devices of {len(rows)} processes lie across this mesh ({dict(mesh.shape)}) so that their shares of a "
            "batch's rows overlap or differ in size: let the devices of a process be neighbours on data and fsdp"
        )
    numbers = {row: number for number, part in enumerate(parts) for row in part}
    return {process: RowShare(numbers[min(own)], len(parts)) for process, own in rows.items()}


def row_share(mesh: Mesh | None) -> RowShare:
    """This process's share of a batch's rows; see `row_shares`."""
    return row_shares(mesh)[jax.process_index()]


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """The placement of every array of `tree` on `mesh`, a tree of the same structure.

    Parameters, and whatever is shaped like them (gradients, moments), go by their logical axis names, and so do the
    arrays of a stream's state; all else is replicated. Leaves may be arrays or `jax.ShapeDtypeStruct`s.
    """

    def place(leaf: Any, axes: Sequence[str | None]) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))

    placed: list[NamedSharding] = []
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable | NamedState)):
        match node:
            case nnx.Variable():
                placed.append(place(node, node.get_metadata("axes")))
            case NamedState():
                placed += jax.tree.leaves(node.map_axes(place))
            case _:
                placed.append(NamedSharding(mesh, PartitionSpec()))
    return jax.tree.unflatten(jax.tree.structure(tree), placed)


def with_placement(abstract: Tree, mesh: Mesh | None) -> Tree:
    """A tree of `jax.ShapeDtypeStruct`s with the shardings of `mesh`; without a mesh, the default device's."""
    if mesh is None:
        placement = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
    else:
        placement = shardings(abstract, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placement)


def shard_model(model: Tree, mesh: Mesh) -> Tree:
    """`model`, or any tree of parameters, with every array moved to its place on `mesh`."""
    return jax.device_put(model, shardings(model, mesh))


def build_sharded(build: Callable[..., Tree], mesh: Mesh | None, *args: Any) -> Tree:
    """`build(*args)` under `jax.jit`, every array made where `shardings` puts it: never whole on one device."""
    if mesh is None:
        return jax.jit(build)(*args)
    placement = shardings(jax.eval_shape(build, *args), mesh)
    with jax.set_mesh(mesh):
        return jax.jit(build, out_shardings=placement)(*args)
