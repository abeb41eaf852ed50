"""Arrays that are only put on the device, or cut, outside of `jit`: by NumPy, where JAX compiles a program for it.

An operation outside of `jit` is a program of its own for every shape, which takes 15 ms to trace and to compile. What
tests do most often computes nothing: `jnp.asarray(x)`, `jnp.zeros(shape)`, `x[0]`, `jnp.copy(x)`. Here NumPy does that
on one device, to the bit, and the result is bound to no device, as JAX's is. The weekly job runs without it.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import mesh as mesh_lib
from jax._src.lax import lax as operations
from jax._src.lax import slicing

EXACT = (np.bool_, np.int8, np.uint8, np.int32, np.uint32, np.float32)  # to which NumPy converts as XLA does


def on_host(x: Any) -> np.ndarray | None:
    """The numbers of what lies on the host, or on one device and is bound to none; None of anything else."""
    if getattr(x, "weak_type", False) or not isinstance(getattr(x, "dtype", None), np.dtype):
        return None
    if isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array):
        plain = not x.committed and x.is_fully_addressable and x.nbytes < 2**20
        return np.asarray(x) if plain else None
    return np.asarray(x)


def stage(x: np.ndarray) -> np.ndarray:
    return x


def convert(x: np.ndarray, new_dtype: Any, weak_type: bool, sharding: Any) -> np.ndarray | None:
    to_floats = np.issubdtype(x.dtype, np.floating) and new_dtype != np.float32
    if weak_type or sharding is not None or new_dtype not in EXACT or to_floats or x.dtype.kind not in "biuf":
        return None
    return x.astype(new_dtype)


def broadcast(x: np.ndarray, shape: Any, broadcast_dimensions: Any, sharding: Any) -> np.ndarray | None:
    if sharding is not None or np.prod(shape, dtype=float) > 2**20:
        return None
    sizes = np.ones(len(shape), int)
    sizes[list(broadcast_dimensions)] = x.shape
    return np.broadcast_to(x.reshape(sizes), shape)


def squeeze(x: np.ndarray, dimensions: Any) -> np.ndarray:
    return np.squeeze(x, axis=tuple(dimensions))


def reshape(x: np.ndarray, new_sizes: Any, dimensions: Any, sharding: Any) -> np.ndarray | None:
    return None if dimensions is not None or sharding is not None else x.reshape(new_sizes)


def static_slice(x: np.ndarray, start_indices: Any, limit_indices: Any, strides: Any) -> np.ndarray:
    strides = strides or (1,) * x.ndim
    return x[tuple(slice(*part) for part in zip(start_indices, limit_indices, strides, strict=True))]


def dynamic_slice(x: np.ndarray, *starts: np.ndarray, slice_sizes: Any) -> np.ndarray:
    """Starts are moved to where the whole slice is inside, as XLA does."""
    first = [min(max(int(at), 0), n - size) for at, n, size in zip(starts, x.shape, slice_sizes, strict=True)]
    return x[tuple(slice(at, at + size) for at, size in zip(first, slice_sizes, strict=True))]


def do_instead(primitive: Any, compute: Callable[..., np.ndarray | None]) -> None:
    original = primitive.impl

    def impl(*operands: Any, **options: Any) -> Any:
        if mesh_lib.get_concrete_mesh().empty and jax.config.jax_default_device is None:
            values = [on_host(x) for x in operands]
            found = None if any(x is None for x in values) else compute(*values, **options)
            if found is not None:
                return jax.device_put(np.array(found))  # a copy: nobody writes into it
        return original(*operands, **options)

    primitive.def_impl(impl)


def install() -> None:
    for module, name, compute in (
        (operations, "stage_p", stage),
        (operations, "convert_element_type_p", convert),
        (operations, "broadcast_in_dim_p", broadcast),
        (operations, "squeeze_p", squeeze),
        (operations, "reshape_p", reshape),
        (operations, "copy_p", stage),
        (slicing, "slice_p", static_slice),
        (slicing, "dynamic_slice_p", dynamic_slice),
    ):
        if hasattr(module, name):  # not every version of JAX has them all
            do_instead(getattr(module, name), compute)
