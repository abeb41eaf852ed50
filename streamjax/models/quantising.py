"""Whole models, and weights that are read a part at a time, as codes and scales (`streamjax.models.quantisation`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Float

from streamjax.models.calibration import output_factor
from streamjax.models.quantisation import QuantisedKernel, QuantisedWeight
from streamjax.models.rounding import Weights, group_size, quantise
from streamjax.parallel.rules import partition_spec

Model = TypeVar("Model", bound=nnx.Module)
Index = tuple[slice, ...]

Layout = Literal["cpu", "gpu", "tpu"]
FILES: Layout = "gpu"  # what files hold: packed codes, and scales as numbers
_ALIGNMENT = 64  # bytes
_BLOCK = 1 << 18  # weights that are quantised at a time
_ROWS_BLOCK = 1 << 21  # the same of whole rows, which are walked along weight by weight


def check_weights(weights: object) -> Weights | None:
    """A kind of quantised weights, or None; ValueError for anything else."""
    if weights is None:
        return None
    for known in get_args(Weights):
        if weights == known:
            return known
    raise ValueError(f"weights is {weights!r}: choose from {', '.join(get_args(Weights))}, or None")


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
    layout: Layout,
    factor: Float[np.ndarray, "n n"] | None = None,
) -> list[np.ndarray]:
    """Codes, offsets if any, and scales, as they lie on a device, of a weight that is read a part at a time.

    Args:
      read: the values at an index.
      shape: of the weight.
      inputs: its input axes, counted from the end.
      weights: "int8" or "int4".
      layout: of int4 on a platform, see `shapes_of`.
      factor: see `quantise`.
    """
    ndim = len(shape)
    along = max((i for i in range(ndim) if i - ndim not in inputs), key=lambda i: shape[i])
    block = _BLOCK if factor is None else _ROWS_BLOCK
    step = max(1, block // max(1, math.prod(shape) // max(1, shape[along])))
    wanted = jax.tree.leaves(shapes_of(shape, inputs, weights, layout))
    arrays = [aligned_empty(part.shape, np.dtype(part.dtype)) for part in wanted]
    for start in range(0, shape[along], step):
        place = tuple(slice(start, start + step) if i == along else slice(None) for i in range(ndim))
        codes, *others = quantise(read(place), inputs, weights, factor)
        if weights == "int4":
            codes = codes if layout == "tpu" else pack(codes, inputs[-1])
            others[-1] = others[-1].view(np.uint16) if layout == "cpu" else others[-1]
        for array, part in zip(arrays, (codes, *others), strict=True):
            array[place] = part
    return arrays


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that begins where JAX wants its own to begin: on CPU it takes such a one as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def shapes_of(shape: tuple[int, ...], inputs: Sequence[int], weights: Weights, layout: Layout) -> QuantisedWeight:
    """What `quantised_parts` gives for a weight, as `jax.ShapeDtypeStruct`s.

    Codes of int4 lie two in a byte, but on TPUs, whose compiler has a type of four bits. On CPUs scales are their bits.
    """
    axis, codes, scales = inputs[-1], list(shape), list(shape)
    for i in inputs if weights == "int8" else ():
        scales[i] = 1
    if weights == "int4":
        scales[axis] //= group_size(shape[axis])
        codes[axis] //= 1 if layout == "tpu" else 2
    codes_of: Any = partial(jax.ShapeDtypeStruct, tuple(codes))
    scales_of: Any = partial(jax.ShapeDtypeStruct, tuple(scales))
    if weights == "int8":
        return QuantisedWeight(codes_of(jnp.int8), None, scales_of(jnp.float32), axis)
    in_codes, in_scales = jnp.int4 if layout == "tpu" else jnp.uint8, jnp.uint16 if layout == "cpu" else jnp.bfloat16
    return QuantisedWeight(codes_of(in_codes), scales_of(jnp.int8), scales_of(in_scales), axis)


def as_weight(parts: Sequence[Any], axis: int) -> QuantisedWeight:
    """The weight of the arrays of `quantised_parts`."""
    codes, *offsets, scales = parts
    return QuantisedWeight(codes, offsets[0] if offsets else None, scales, axis)


def output_of(model: Any) -> str:
    """The name of a `Decoder`'s output matrix."""
    return "embedding" if model.head is None else "head"


def layout_here() -> Layout:
    """How codes of int4 lie on the default backend."""
    layouts: Mapping[str, Layout] = {"cpu": "cpu", "tpu": "tpu"}
    return layouts.get(jax.default_backend(), "gpu")


def weights_of(model: nnx.Module) -> Weights | None:
    """What kind of quantised weights a model has."""
    found = next((node for _, _, node in _attributes(model) if isinstance(node, QuantisedKernel)), None)
    return None if found is None else "int8" if found.codes.get_value().dtype == jnp.int8 else "int4"


def refuse_quantised(model: nnx.Module, what: str) -> None:
    """Raise ValueError if the model's weights are quantised."""
    if weights := weights_of(model):
        raise ValueError(f"the model's weights are {weights}: {what}")


def quantised_shapes(model: Model, weights: Weights | None, layout: Layout | None = None) -> Model:
    """A model of `jax.ShapeDtypeStruct`s with codes and scales in the place of its kernels; laid out for here if None.

    Raises:
      ValueError: one that names a kernel that int4 has no groups for.
    """

    if weights is None:
        return model

    def shapes(name: str, parameter: nnx.Param, inputs: Sequence[int]) -> QuantisedWeight:
        try:
            return shapes_of(parameter.shape, inputs, weights, layout or layout_here())
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

    def quantised(
        factor: np.ndarray | None, name: str, parameter: nnx.Param, inputs: Sequence[int]
    ) -> QuantisedWeight | None:
        value = parameter.get_value()
        read = lambda index: np.asarray(value[index])  # noqa: E731
        if name == output and factor is None:
            return None
        parts = quantised_parts(read, value.shape, inputs, weights, layout_here(), factor)
        return as_weight([_beside(parameter, part) for part in parts], inputs[-1])

    output = output_of(model) if weights == "int4" else ""
    others = _replaced(model, partial(quantised, None))
    if not output:
        return others
    embedding, decoder = getattr(model, "embedding"), cast(Any, others)  # noqa: B009  of a `Decoder`
    factor = output_factor(decoder, lambda ids: np.asarray(embedding.get_value()[ids], np.float32))
    return _replaced(others, partial(quantised, factor))


def with_codes(model: Model, layout: Layout) -> Model:
    """A model whose codes and scales of int4 lie as on a platform; as it is without such codes."""
    if weights_of(model) != "int4":
        return model
    leaves, structure = jax.tree.flatten(model)
    copy: Model = jax.tree.unflatten(structure, leaves)
    for _, _, node in list(_attributes(copy)):
        if isinstance(node, QuantisedKernel):
            if node.value.packed != (layout != "tpu"):
                codes = np.asarray(node.codes.get_value())
                codes = unpack(codes, node.axis) if layout == "tpu" else pack(codes.astype(np.int8), node.axis)
                node.codes.set_value(_beside(node.codes, codes.astype(ml_dtypes.int4) if layout == "tpu" else codes))
            scales, kind = node.scales.get_value(), jnp.uint16 if layout == "cpu" else jnp.bfloat16
            if scales.dtype != kind:
                node.scales.set_value(_beside(node.scales, np.asarray(scales).view(kind)))
    return copy


def _beside(variable: nnx.Variable, values: np.ndarray) -> jax.Array:
    """Values on the devices of a variable, split by its axes."""
    sharding = variable.get_value().sharding
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        sharding = NamedSharding(mesh, partition_spec(variable.get_metadata("axes"), values.shape, mesh))
    return jax.device_put(values, sharding)


def _replaced(model: Model, make: Callable[[str, nnx.Param, tuple[int, ...]], QuantisedWeight | None]) -> Model:
    """A copy of a model with what `make` gives for each kernel in its place, if anything."""
    leaves, structure = jax.tree.flatten(model)
    copy: Model = jax.tree.unflatten(structure, leaves)
    for path, module, node in list(_attributes(copy)):
        inputs = input_axes(node)
        value = None if inputs is None else make(".".join(map(str, path)), node, inputs)
        if value is not None:
            setattr(module, str(path[-1]), QuantisedKernel(value, node.get_metadata("axes")))
    return copy


def _attributes(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], nnx.Module, Any]]:
    """Every attribute of every module: its path, the module, and what it is."""
    for path, module in nnx.iter_modules(model):
        for name, node in list(vars(module).items()):
            yield (*path, name), module, node
