"""What a training run carries from step to step, and where its arrays live."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from streamjax.models.decoder import Decoder
from streamjax.parallel.rules import partition_spec

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Model with its master weights, optimizer state, and the number of steps done (int32 scalar)."""

    model: Decoder
    opt_state: Any
    step: Int32[Array, ""]


def new_state(model: Decoder, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Pure: use it under `jax.jit` or `jax.eval_shape`."""
    return TrainState(model, optimizer.init(model), jnp.zeros((), jnp.int32))


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """The placement of every array of `tree` on `mesh`, a tree of the same structure.

    Parameters, and whatever is shaped like them (gradients, moments), go by their logical axis names; all else is
    replicated. Leaves may be arrays or `jax.ShapeDtypeStruct`s.
    """

    def place(leaf: Any) -> NamedSharding:
        axes = leaf.axes if isinstance(leaf, nnx.Variable) else ()
        shape = leaf.shape if isinstance(leaf, nnx.Variable) else ()
        return NamedSharding(mesh, partition_spec(axes, shape, mesh) if axes else PartitionSpec())

    flat = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return jax.tree.unflatten(jax.tree.structure(tree), [place(leaf) for leaf in flat])


def build_sharded(build: Callable[..., Tree], mesh: Mesh | None, *args: Any) -> Tree:
    """`build(*args)` under `jax.jit`, every array made where `shardings` puts it: never whole on one device."""
    if mesh is None:
        return jax.jit(build)(*args)
    placement = shardings(jax.eval_shape(build, *args), mesh)
    with jax.set_mesh(mesh):
        return jax.jit(build, out_shardings=placement)(*args)


def shard_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Host arrays [B, T] to device arrays, rows split over the mesh's batch axes.

    With several processes each passes its own rows.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)

    def place(x: Any) -> Array:
        rows = x.shape[0] * jax.process_count()
        sharding = NamedSharding(mesh, partition_spec(("batch", None), (rows, *x.shape[1:]), mesh))
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(place, batch)
