"""Kernels on a mesh of devices: each device calls one on its own rows, heads and queries.

A compiler cannot split a kernel. So the mesh axes are taken by hand (`jax.shard_map`) around the call, as the table in
`streamjax.parallel.rules` places the arrays: rows over data and fsdp, heads over tensor, and queries over context, each
of whose devices reads the keys of all. No device talks to another but to gather those, and to add their gradients up.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels import api
from pallas_kernels.partial import Partial
from pallas_kernels.patterns import Pattern
from streamjax.parallel.rules import axes_of, free_spec

Names = tuple[str | None, ...]  # of dimensions, as in `streamjax.parallel.rules`
CONTEXT = "context"  # the mesh axis along which devices share sequences
HEADS = {"heads", "kv_heads"}  # split together or not at all: a key head stays with its query heads
_STRETCHES: ContextVar[bool] = ContextVar("stretches", default=False)


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    pattern: Pattern,
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    slopes: Float[Array, " H"] | None = None,
    **settings: Any,
) -> Partial:
    """`pallas_kernels.api.flash_attention` of a sequence to itself, under the mesh of `jax.set_mesh` if there is one.

    Args:
      q, k, v, pattern, segment_ids, slopes: as there.
      settings: its other arguments, but for the offset.
    """
    k, v = (a_key_head_for_each_device(x, q.shape[2]) for x in (k, v))

    def own(q: Array, k: Array, v: Array, ids: Any, key_ids: Any, slopes: Any, index: Int[Array, " T"]) -> Partial:
        known = None if ids is None else (ids, key_ids)
        offset = 0 if q.shape[1] == k.shape[1] else index[0]  # an int makes the kernel's grid exact
        return api.flash_attention(q, k, v, pattern, segment_ids=known, slopes=slopes, offset=offset, **settings)

    query, key = ("batch", "length", "heads", None), ("batch", None, "kv_heads", None)
    return per_device_call(
        own,
        (query, key, key, query[:2], key[:2], ("heads",), ("length",)),
        names_of_partial(query),
        (q, k, v, segment_ids, segment_ids, slopes, jnp.arange(q.shape[1])),
    )


def per_device_call(
    call: Callable[..., Any], names: tuple[Names, ...], out_names: Any, arrays: tuple[Array | None, ...]
) -> Any:
    """`call(*arrays)` by each device of the mesh on its share of the arrays; plainly where there is no mesh.

    Args:
      call: works on any rows, heads and queries by themselves.
      names: the dimensions of each array. What a name does not split in one of them it splits in none.
      out_names: the same of what `call` returns, in its structure.
      arrays: None for what is not there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if mesh.size <= 1 or not free:
        return _alone(call)(*arrays)
    splits: dict[str, set[Any]] = {}
    for dims, x in zip(names, arrays, strict=True):
        if x is not None:
            for name, axes in zip(dims, free_spec(dims, x.shape, mesh), strict=True):
                splits.setdefault(name or "", set()).add(axes)
    whole = {name for name, found in splits.items() if len(found) > 1}
    whole |= HEADS if any(None in splits.get(name, ()) for name in HEADS) else set()

    def spec(dims: Names) -> PartitionSpec:
        return PartitionSpec(
            *(None if name is None or name in whole else next(iter(splits[name]), None) for name in dims)
        )

    in_specs = tuple(None if x is None else spec(dims) for dims, x in zip(names, arrays, strict=True))
    out_specs = jax.tree.map(spec, out_names, is_leaf=_are_names)
    return jax.shard_map(
        _alone(call), mesh=mesh, axis_names=free, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )(*arrays)  # fmt: skip


@contextlib.contextmanager
def as_stretches(stretches: bool = True) -> Iterator[None]:
    """Inside, within `jax.shard_map` over the axis `context`: what layers call sequences are each device's stretches of
    them, and attention, recurrences and convolutions go over the devices."""
    token = _STRETCHES.set(stretches)
    try:
        yield
    finally:
        _STRETCHES.reset(token)


def _alone(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, for which what a device has is all there is."""

    def run(*arrays: Any) -> Any:
        with as_stretches(False):
            return call(*arrays)

    return run


def context_shards(length: int) -> int:
    """Over how many devices the mesh splits sequences of `length` tokens.

    Within `jax.shard_map` over the axis that is 1, or with `as_stretches` all devices along it, each of which has
    `length` tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    size: int = mesh.shape.get(CONTEXT, 1)
    if CONTEXT in mesh.manual_axes:
        return size if _STRETCHES.get() else 1
    return size if length % size == 0 else 1


def are_stretches() -> bool:
    """Whether this is inside `as_stretches`."""
    return _STRETCHES.get() and CONTEXT in jax.sharding.get_abstract_mesh().manual_axes


def names_of_partial(query: Names) -> Any:
    """Of what attention of queries with these names returns."""
    return Partial(query, query[:-1])  # type: ignore[arg-type]


def _are_names(x: Any) -> bool:
    return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


def splits(name: str) -> bool:
    """Whether the mesh splits dimensions with a logical name."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and free_spec((name,), (mesh.size,), mesh)[0] is not None


def whole_on_each_device(name: str, size: int) -> bool:
    """Whether the mesh would split dimensions with a logical name, but not one of `size`."""
    return splits(name) and free_spec((name,), (size,), jax.sharding.get_abstract_mesh())[0] is None


def a_key_head_for_each_device(x: Float[Array, "B ..."], heads: int, axis: int = 2) -> Float[Array, "B ..."]:
    """Keys whose heads can be split as `heads` query heads are: where there are fewer than devices, repeated.

    axis: which dimension is that of the key heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    width = math.prod(mesh.shape[name] for name in axes_of(free_spec(("heads",), (heads,), mesh)[0]))
    return jnp.repeat(x, width // x.shape[axis], axis=axis) if width % x.shape[axis] == 0 else x
