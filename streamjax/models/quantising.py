"""From weights to codes and scales (`streamjax.models.quantisation`): numbers on the host, and whole models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Float

from streamjax.models.quantisation import QuantisedKernel, QuantisedWeight
from streamjax.parallel.rules import partition_spec

Weights = Literal["int8", "int4"]
Model = TypeVar("Model", bound=nnx.Module)
Index = tuple[slice, ...]

GROUP = 32  # weights with one scale
_SMALLEST_GROUP = 8
_RANGES = (1.0, 0.9, 0.8)  # of a group's weights, covered by its codes: where the search begins
_FITS = 2  # times that scale and offset are fitted to the codes
_TINY = np.finfo(np.float32).tiny
_ALIGNMENT = 64  # bytes
_BLOCK = 1 << 18  # weights that are quantised at a time


def check_weights(weights: object) -> Weights | None:
    """A kind of quantised weights, or None; ValueError for anything else."""
    if weights is None:
        return None
    for known in get_args(Weights):
        if weights == known:
            return known
    raise ValueError(f"weights is {weights!r}: choose from {', '.join(get_args(Weights))}, or None")


def quantise(
    values: Float[np.ndarray, "..."],
    inputs: Sequence[int],
    weights: Weights,
    importance: Float[np.ndarray, " n"] | None = None,
) -> tuple[np.ndarray, ...]:
    """Codes, int8, offsets of int4, int8, and scales of a weight, or of a part of it with all of its input axes.

    Codes are rounded to the nearest, ties to the even one. Of int4, each group takes the scale and the offset that
    leave the smallest squared error, of a few ranges that it may cover and the fits of a line to their codes. The
    scales of int4 are bfloat16, those of int8 float32.

    Args:
      values: the weight.
      inputs: its input axes.
      weights: "int8" or "int4".
      importance: of the places of the last input axis, a factor on their squared errors; all alike where None.

    Raises:
      ValueError: int4, and the last input axis has no groups of 8 at least.
    """
    values = np.asarray(values, np.float32)
    if weights == "int8":
        scales = np.maximum(np.max(np.abs(values), axis=tuple(inputs), keepdims=True, initial=0) / 127, _TINY)
        return np.clip(np.rint(values / scales), -127, 127).astype(np.int8), scales.astype(np.float32)
    axis = inputs[-1] % values.ndim
    moved = np.moveaxis(values, axis, -1)
    rows = moved.reshape(-1, group_size(values.shape[axis]))
    known = None if importance is None else np.ascontiguousarray(np.resize(importance, rows.shape).T, np.float32)
    found = _quantised_groups(np.ascontiguousarray(rows.T), known)
    return tuple(np.moveaxis(x.T.reshape(*moved.shape[:-1], -1), -1, axis) for x in found)


def _quantised_groups(rows: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [group, N], offsets [1, N] and scales [1, N] of groups of weights; NumPy adds fastest along axis 0."""
    low = np.minimum(rows.min(axis=0, keepdims=True), 0)
    width = np.maximum(rows.max(axis=0, keepdims=True), 0) - low
    best: tuple[np.ndarray, ...] = ()
    for share in _RANGES:
        scales = width * np.float32(share / 15)
        bottom = low + width * np.float32((1 - share) / 2)
        for fit in range(_FITS + 1):
            found = _rounded(rows, bottom, scales, importance)
            if fit < _FITS:
                bottom, scales = _fitted(rows, found[0], importance, bottom, scales)
            better = found[-1] < best[-1] if best else True
            best = best or found
            for new, old in zip(found, best, strict=True):
                np.copyto(old, new, where=better)
    codes, offsets, scales, _ = best
    return codes.astype(np.int8), offsets.astype(np.int8), scales.astype(ml_dtypes.bfloat16)


def _rounded(rows: np.ndarray, bottom: np.ndarray, scales: np.ndarray, importance: Any) -> tuple[np.ndarray, ...]:
    """Codes, offsets and scales, as float32, for groups whose lowest code is to stand for `bottom`; their errors."""
    scales = np.maximum(scales, _TINY).astype(ml_dtypes.bfloat16).astype(np.float32)
    offsets = np.clip(np.rint((bottom / scales + 8) * 16), -128, 127)
    codes = rows / scales
    codes -= offsets / 16
    np.clip(np.rint(codes, out=codes), -8, 7, out=codes)
    errors = codes + offsets / 16
    errors *= scales
    errors -= rows
    errors *= errors
    if importance is not None:
        errors *= importance
    return codes, offsets, scales, errors.sum(axis=0, keepdims=True)


def _fitted(
    rows: np.ndarray, codes: np.ndarray, importance: Any, bottom: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bottom and scale of the line through each group's weights over its codes; the old ones where there is none."""
    share: Any = np.float32(1 / len(rows))
    if importance is not None:
        share = importance / np.maximum(importance.sum(axis=0, keepdims=True), _TINY)
    of_codes, of_rows = ((x * share).sum(axis=0, keepdims=True) for x in (codes, rows))
    weighted = codes - of_codes
    weighted *= share
    spread = (weighted * codes).sum(axis=0, keepdims=True)
    weighted *= rows
    slope = weighted.sum(axis=0, keepdims=True) / np.maximum(spread, _TINY)
    fits = (spread > 0) & (slope > 0)
    return np.where(fits, of_rows - slope * (of_codes + 8), bottom), np.where(fits, slope, scales)


def group_size(width: int) -> int:
    """How many neighbours along an axis share a scale of int4.

    Raises:
      ValueError: too few.
    """
    size = math.gcd(width, GROUP)
    if size < _SMALLEST_GROUP:
        raise ValueError(f"int4 has a scale for {GROUP} weights, and an axis of {width} has no such groups: take int8")
    return size


def pack(codes: np.ndarray, axis: int) -> np.ndarray:
    """Codes of four bits, two in a byte; see `QuantisedWeight`."""
    axis %= codes.ndim
    half = group_size(codes.shape[axis]) // 2
    pairs = (codes + 8).astype(np.uint8).reshape(*codes.shape[:axis], -1, 2, half, *codes.shape[axis + 1 :])
    low, high = np.split(pairs, 2, axis + 1)
    shape = [size // 2 if i == axis else size for i, size in enumerate(codes.shape)]
    return (low | high << 4).reshape(shape)


def unpack(codes: np.ndarray, axis: int) -> np.ndarray:
    """The inverse of `pack`, int8."""
    axis %= codes.ndim
    half = group_size(2 * codes.shape[axis]) // 2
    grouped = codes.reshape(*codes.shape[:axis], -1, 1, half, *codes.shape[axis + 1 :])
    shape = [2 * size if i == axis else size for i, size in enumerate(codes.shape)]
    return np.concatenate((grouped & 15, grouped >> 4), axis + 1).astype(np.int8).reshape(shape) - np.int8(8)


def input_axes(parameter: Any) -> tuple[int, ...] | None:
    """The axes, counted from the end, over which a kernel's product sums; None of what is not quantised."""
    inputs = parameter.get_metadata("inputs", None) if isinstance(parameter, nnx.Param) else None
    return tuple(axis - len(parameter.get_metadata("axes")) for axis in inputs) if inputs else None


def quantised_parts(
    read: Callable[[Index], np.ndarray],
    shape: tuple[int, ...],
    inputs: Sequence[int],
    weights: Weights,
    packed: bool,
    importance: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Codes, offsets if any, and scales, as they lie on a device, of a weight that is read a part at a time.

    Args:
      read: the values at an index.
      shape: of the weight.
      inputs: its input axes, counted from the end.
      weights: "int8" or "int4".
      packed: whether two codes of int4 share a byte.
      importance: see `quantise`.
    """
    ndim = len(shape)
    along = max((i for i in range(ndim) if i - ndim not in inputs), key=lambda i: shape[i])
    step = max(1, _BLOCK // max(1, math.prod(shape) // max(1, shape[along])))
    wanted = jax.tree.leaves(shapes_of(shape, inputs, weights, packed))
    arrays = [aligned_empty(part.shape, np.dtype(part.dtype)) for part in wanted]
    for start in range(0, shape[along], step):
        place = tuple(slice(start, start + step) if i == along else slice(None) for i in range(ndim))
        codes, *others = quantise(read(place), inputs, weights, importance)
        codes = pack(codes, inputs[-1]) if weights == "int4" and packed else codes
        for array, part in zip(arrays, (codes, *others), strict=True):
            array[place] = part
    return arrays


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that begins where JAX wants its own to begin: on CPU it takes such a one as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def shapes_of(shape: tuple[int, ...], inputs: Sequence[int], weights: Weights, packed: bool) -> QuantisedWeight:
    """What `quantised_parts` gives for a weight, as `jax.ShapeDtypeStruct`s."""
    axis, codes, scales = inputs[-1], list(shape), list(shape)
    for i in inputs if weights == "int8" else ():
        scales[i] = 1
    if weights == "int4":
        scales[axis] //= group_size(shape[axis])
        codes[axis] //= 2 if packed else 1
    codes_of: Any = partial(jax.ShapeDtypeStruct, tuple(codes))
    scales_of: Any = partial(jax.ShapeDtypeStruct, tuple(scales))
    if weights == "int8":
        return QuantisedWeight(codes_of(jnp.int8), None, scales_of(jnp.float32), axis)
    return QuantisedWeight(
        codes_of(jnp.uint8 if packed else jnp.int4), scales_of(jnp.int8), scales_of(jnp.bfloat16), axis
    )


def as_weight(parts: Sequence[Any], axis: int) -> QuantisedWeight:
    """The weight of the arrays of `quantised_parts`."""
    codes, *offsets, scales = parts
    return QuantisedWeight(codes, offsets[0] if offsets else None, scales, axis)


def importance_of(name: str, model: Any, norm: Callable[[], np.ndarray]) -> np.ndarray | None:
    """How much an error in each input channel of a kernel weighs, where the model says so.

    Args:
      name: of the parameter.
      model: a `Decoder`.
      norm: gives the weight of its last norm: the squares of its factors are the sizes of what the output matrix meets.
    """
    output = "embedding" if model.head is None else "head"
    return np.square(norm().astype(np.float32) + model.norm.offset) if name == output else None


def packs() -> bool:
    """Whether codes of int4 lie two in a byte: but on TPUs, whose compiler has a type of four bits."""
    return jax.default_backend() != "tpu"


def weights_of(model: nnx.Module) -> Weights | None:
    """What kind of quantised weights a model has."""
    found = next((node for _, _, node in _attributes(model) if isinstance(node, QuantisedKernel)), None)
    return None if found is None else "int8" if found.codes.get_value().dtype == jnp.int8 else "int4"


def refuse_quantised(model: nnx.Module, what: str) -> None:
    """Raise ValueError if the model's weights are quantised."""
    if weights := weights_of(model):
        raise ValueError(f"the model's weights are {weights}: {what}")


def quantised_shapes(model: Model, weights: Weights | None, packed: bool | None = None) -> Model:
    """A model of `jax.ShapeDtypeStruct`s with codes and scales in the place of its kernels.

    Raises:
      ValueError: one that names a kernel that int4 has no groups for.
    """

    if weights is None:
        return model

    def shapes(name: str, parameter: nnx.Param, inputs: Sequence[int]) -> QuantisedWeight:
        try:
            return shapes_of(parameter.shape, inputs, weights, packs() if packed is None else packed)
        except ValueError as error:
            raise ValueError(f"weights is {weights!r}, and {name}: {error}") from None

    return _replaced(model, shapes)


def quantised_model(model: Model, weights: Weights | None) -> Model:
    """A model with codes and scales in the place of its kernels, where these lie; the rest of it is shared.

    Raises:
      ValueError: it has quantised weights of the other kind, or a kernel that int4 has no groups for.
    """

    if weights is None or weights_of(model) == weights:
        return model
    refuse_quantised(model, f"load the model that they were made of to have {weights}")
    quantised_shapes(jax.eval_shape(lambda: model), weights)  # refuses before anything is done
    norm = getattr(model, "norm")  # noqa: B009  of a `Decoder`, which imports this file

    def quantised(name: str, parameter: nnx.Param, inputs: Sequence[int]) -> QuantisedWeight:
        value = parameter.get_value()
        read = lambda index: np.asarray(value[index])  # noqa: E731
        known = importance_of(name, model, lambda: np.asarray(norm.weight.get_value()))
        parts = quantised_parts(read, value.shape, inputs, weights, packs(), known)
        return as_weight([_beside(parameter, part) for part in parts], inputs[-1])

    return _replaced(model, quantised)


def with_codes(model: Model, packed: bool) -> Model:
    """A model whose codes of int4 lie two in a byte, or have a type of four bits; as it is without such codes."""
    if weights_of(model) != "int4":
        return model
    leaves, structure = jax.tree.flatten(model)
    copy: Model = jax.tree.unflatten(structure, leaves)
    for _, _, node in list(_attributes(copy)):
        if isinstance(node, QuantisedKernel) and node.value.packed != packed:
            codes = np.asarray(node.codes.get_value())
            codes = pack(codes.astype(np.int8), node.axis) if packed else unpack(codes, node.axis)
            node.codes.set_value(_beside(node.codes, codes if packed else codes.astype(ml_dtypes.int4)))
    return copy


def _beside(variable: nnx.Variable, values: np.ndarray) -> jax.Array:
    """Values on the devices of a variable, split by its axes."""
    sharding = variable.get_value().sharding
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        sharding = NamedSharding(mesh, partition_spec(variable.get_metadata("axes"), values.shape, mesh))
    return jax.device_put(values, sharding)


def _replaced(model: Model, make: Callable[[str, nnx.Param, tuple[int, ...]], QuantisedWeight]) -> Model:
    """A copy of a model with what `make` gives for each kernel in its place."""
    leaves, structure = jax.tree.flatten(model)
    copy: Model = jax.tree.unflatten(structure, leaves)
    for path, module, node in list(_attributes(copy)):
        inputs = input_axes(node)
        if inputs is not None:
            name = ".".join(map(str, path))
            setattr(module, str(path[-1]), QuantisedKernel(make(name, node, inputs), node.get_metadata("axes")))
    return copy


def _attributes(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], nnx.Module, Any]]:
    """Every attribute of every module: its path, the module, and what it is."""
    for path, module in nnx.iter_modules(model):
        for name, node in list(vars(module).items()):
            yield (*path, name), module, node
