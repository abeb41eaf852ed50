"""Logical axis names and the one table that maps them to mesh axes.

Parameters carry their logical names as metadata (`nnx.Param(..., axes=("embed", "mlp"))`), activations and KV state are
named where they are made. Everything that decides a placement reads `RULES`. A dimension that its mesh axes do not
divide evenly is replicated over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

STAGE = "stage"  # the mesh axis of a pipeline
RULES: Mapping[str, tuple[str, ...]] = {
    # activations and state
    "batch": ("replica", "data", "fsdp", "expert"),
    "replica": ("replica",),
    "length": ("context",),
    "slots": ("context",),
    # parameters
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "layers": (STAGE,),
    "kv_heads": ("tensor",),
    "heads": ("tensor",),
    # never split: a head's channels, taps of a convolution, the query heads of a group, gate and up halves, scores of a
    # router, latents, ranks of adapters
    "activation_embed": (),
    "head_dim": (),
    "conv": (),
    "group": (),
    "gates": (),
    "router": (),
    "latent": (),
    "lora": (),
}


STATE_AXES = ("batch", "kv_heads", "slots", "head_dim")  # what the dimensions of a state's arrays mean, in order


@runtime_checkable
class NamedState(Protocol):
    """A pytree that knows the logical names of its arrays' dimensions."""

    def map_axes(self, fn: Callable[[Any, Sequence[str | None]], Any]) -> Any:
        """A copy with `fn(array, names)` in the place of every array."""


def map_state_axes(fn: Callable[[Any, Sequence[str | None]], Any], state: Any) -> Any:
    """`fn(array, logical names of its dimensions)` in the place of every array of layers' states.

    Those of tiers have `STATE_AXES`; a state that knows its own (`NamedState`) is asked.
    """

    def named(node: Any) -> bool:
        return isinstance(node, NamedState)

    def place(node: Any) -> Any:
        if named(node):
            return node.map_axes(fn)
        return fn(node, (STATE_AXES + (None,) * len(node.shape))[: len(node.shape)])

    return jax.tree.map(place, state, is_leaf=named)


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Mapping | None = None
) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names.

    Args:
      axes: one logical name (or None) a dimension; fewer names than dimensions name the last ones, and the one in front
        of them is that of stacked layers.
      shape: the array's shape.
      mesh: mesh whose axis names and sizes apply; mesh axes that it lacks are left out.
      rules: logical name -> mesh axes; `RULES` by default.

    Raises:
      ValueError: a logical name that the table does not have.
    """
    rules = RULES if rules is None else rules
    front = len(shape) - len(axes)
    axes = (None,) * (front - 1) + ("layers",) * min(front, 1) + tuple(axes)
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(sorted(rules))}")
        chosen: list[str] = []
        for mesh_axis in rules[name] if name is not None else ():
            width = mesh.shape.get(mesh_axis, 1)
            if width > 1 and mesh_axis not in used and size % (width * math.prod(mesh.shape[a] for a in chosen)) == 0:
                chosen.append(mesh_axis)
                used.add(mesh_axis)
        entries.append(tuple(chosen) or None)
    return PartitionSpec(*entries)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Ask the compiler to place `x` by the table, under the mesh of `jax.set_mesh`; without one, return `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, free_spec(axes, x.shape, mesh)))


def free_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: AbstractMesh) -> PartitionSpec:
    """`partition_spec` without the mesh axes that `jax.shard_map` took by hand: the compiler does not place those."""
    manual = set(mesh.manual_axes)
    rules = {name: tuple(axis for axis in found if axis not in manual) for name, found in RULES.items()}
    return partition_spec(axes, shape, mesh, rules)
