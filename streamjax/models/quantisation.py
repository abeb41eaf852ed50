"""Weights in few bits at run time: codes and scales in the place of a kernel, and their product with activations.

int8: a weight is its code, -127 to 127, times the scale of its output channel. int4: groups of 32 weights along the
last input axis (the largest power of two that divides the axis, where 32 does not) have a scale and an offset, and a
weight is its code, -8 to 7, plus the offset, times the scale. So weights of GGUF's types of four bits stay what they
were. Activations are not quantised.

No dequantised copy of a weight is made where one token is decoded. XLA for TPUs fuses the conversion with the product,
given codes of type int4, and for GPUs that of int8. On GPUs two codes of four bits share a byte, and a kernel takes a
product with few rows. On CPUs they do too, and such a product walks over the codes in a loop that dequantises what the
cache holds.

Codes and scales have the axes of the weight, so a mesh splits them as it splits the weight. They are no `nnx.Param`:
training leaves them alone. A gradient goes through a product to its activations, as it would for the weight that codes
and scales stand for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import api
from pallas_kernels.gpu import grouped_product
from pallas_kernels.partial import accumulator
from streamjax.parallel.rules import constrain

_FEW_ROWS = 4  # of activations: more are a matrix product, for which the CPU dequantises the weight
_MORE_ROWS = 2  # with which XLA for GPUs takes a matrix product
_ROWS = 32  # of codes, at least, that a step of a loop adds: with fewer, the sums of a wide output cost more
_CODES_AT_A_TIME = 1 << 16  # that one step of a loop dequantises: 256 kB of float32


class QuantisedArray(nnx.Variable):
    """Codes or scales: no parameter that training changes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedWeight:
    """Codes and scales of a weight, or of a part of it; a pytree of the two.

    Attributes:
      codes: int8 or int4, shaped as the weight; or uint8 with half as many places along `axis`, two codes plus 8 in a
        byte. The lower halves of a group's bytes are its first codes, the upper halves the others.
      offsets: of int4, in sixteenths, int8; shaped as the scales. None of int8.
      scales: of the same axes, with one place for all weights that share a scale. Those of int4 are bfloat16; on CPUs
        its bits, uint16: XLA's CPU backend takes no slices of bfloat16 in a loop, and would copy all of them first.
      axis: the last input axis, counted from the end.
    """

    codes: Array
    offsets: Array | None
    scales: Array
    axis: int = dataclasses.field(metadata={"static": True})

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.codes.dtype == jnp.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        shape = list(self.codes.shape)
        shape[self.axis] *= 2 if self.packed else 1
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    def __getitem__(self, index: Any) -> QuantisedWeight:
        """A part along axes that are no input axes."""
        return jax.tree.map(lambda x: x[index], self)

    def merged(self, start: int, stop: int) -> QuantisedWeight:
        """With the axes from `start` up to, not including, `stop` as one: input axes, or output axes."""
        axis = self.axis + (stop - start - 1) * (self.ndim + self.axis < start)
        return dataclasses.replace(jax.tree.map(lambda x: merge_axes(x, start, stop), self), axis=axis)

    def astype(self, dtype: Any) -> Float[Array, "..."]:
        """The weight that codes and scales stand for."""
        if not self.packed:
            return self._scaled(self.codes.astype(dtype), dtype)
        halves = [self._grouped(half.astype(dtype)) for half in self.halves(dtype)]
        return jnp.stack(halves, self.axis % self.ndim + 1).reshape(self.shape)

    def halves(self, dtype: Any) -> list[Float[Array, "..."]]:
        """The weights of the lower halves of the bytes, and those of the upper ones."""
        nibbles = self.codes & 15, self.codes >> 4
        return [self._scaled((nibble.astype(jnp.int8) - 8).astype(dtype), dtype) for nibble in nibbles]

    def _grouped(self, x: Array) -> Array:
        """With a group's places on an axis of their own, behind the axis of groups."""
        place, groups = self.axis % self.ndim, self.scales.shape[self.axis]
        return x.reshape(*x.shape[:place], groups, -1, *x.shape[place + 1 :])

    def _scaled(self, codes: Array, dtype: Any) -> Array:
        if self.offsets is None:
            return codes * self.factors(dtype)
        scales, offsets = (
            jnp.expand_dims(x, self.axis % self.ndim + 1) for x in (self.factors(dtype), self.shifts(dtype))
        )
        return ((self._grouped(codes) + offsets) * scales).reshape(codes.shape)

    def without_offsets(self, dtype: Any) -> Float[Array, "..."]:
        """Codes that are not packed, times their scales."""
        scales = jnp.expand_dims(self.factors(dtype), self.axis % self.ndim + 1)
        return (self._grouped(self.codes.astype(dtype)) * scales).reshape(self.codes.shape)

    def factors(self, dtype: Any) -> Float[Array, "..."]:
        """The scales as numbers."""
        bits = self.scales.dtype == jnp.uint16
        scales = jax.lax.bitcast_convert_type(self.scales, jnp.bfloat16) if bits else self.scales
        return scales.astype(dtype)

    def shifts(self, dtype: Any) -> Float[Array, "..."]:
        """The offsets of int4 as numbers."""
        assert self.offsets is not None
        return self.offsets.astype(dtype) / 16


class QuantisedKernel(nnx.Module):
    """A quantised weight in the place of an `nnx.Param`: indexing gives its value, `axes` name its dimensions."""

    def __init__(self, value: QuantisedWeight, axes: Sequence[str]):
        axes = tuple(axes)
        self.axis = value.axis
        self.codes = QuantisedArray(value.codes, axes=axes)
        self.offsets = None if value.offsets is None else QuantisedArray(value.offsets, axes=axes)
        self.scales = QuantisedArray(value.scales, axes=axes)

    @property
    def value(self) -> QuantisedWeight:
        offsets = None if self.offsets is None else self.offsets.get_value()
        return QuantisedWeight(self.codes.get_value(), offsets, self.scales.get_value(), self.axis)

    def __getitem__(self, index: Any) -> QuantisedWeight:
        return self.value if index is Ellipsis else self.value[index]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    def get_metadata(self, name: str) -> Any:
        """Of its arrays: "axes"."""
        return self.codes.get_metadata(name)


def merge_axes(weight: Any, start: int, stop: int) -> Any:
    """A weight of either kind with some neighbouring axes as one."""
    if isinstance(weight, QuantisedWeight):
        return weight.merged(start, stop)
    return weight.reshape(*weight.shape[:start], math.prod(weight.shape[start:stop]), *weight.shape[stop:])


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def quantised_product(equation: str, x: Float[Array, "..."], weight: QuantisedWeight, dtype: Any) -> Array:
    """`einsum` of activations and a quantised weight, accumulated in float32 (float64 for float64) and rounded once.

    Args:
      equation: letters of `x` and of the weight, and of the result, which has all letters of `x` that are not summed
        over in front, in their order.
      x: activations.
      weight: codes and scales.
      dtype: of the result.
    """
    on_cpu, on_gpu, fused = (partial(f, equation, dtype) for f in (_on_cpu, _on_gpu, _fused))
    return jax.lax.platform_dependent(x, weight, cpu=on_cpu, cuda=on_gpu, default=fused)


def _forward(equation: str, x: Array, weight: QuantisedWeight, dtype: Any) -> tuple[Array, tuple[Any, Any]]:
    return quantised_product(equation, x, weight, dtype), (weight, jnp.zeros((), x.dtype))


def _backward(equation: str, dtype: Any, saved: tuple[Any, Any], cotangent: Array) -> tuple[Array, None]:
    weight, like = saved
    left, of_weight, out = _letters(equation)
    return _fused(f"{out},{of_weight}->{left}", like.dtype, cotangent.astype(like.dtype), weight), None


quantised_product.defvjp(_forward, _backward)


def _letters(equation: str) -> tuple[str, str, str]:
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    return left, right, out


def _fused(equation: str, dtype: Any, x: Array, weight: QuantisedWeight) -> Array:
    """The product as an einsum of dequantised weights; scales that belong to channels stay out of it."""
    left, right, out = _letters(equation)
    sums = accumulator(x.dtype)
    by_letter = dict(zip(right, weight.scales.shape, strict=True))
    if weight.offsets is None:
        kept = [letter for letter in right if by_letter[letter] > 1]
        flat = weight.scales.reshape([by_letter[letter] for letter in kept])
        if all(letter in out for letter in kept):
            y = jnp.einsum(equation, x, weight.codes.astype(x.dtype), preferred_element_type=sums)
            return (y * _spread(flat, kept, out).astype(sums)).astype(dtype)
        if all(letter in left for letter in kept):
            x = (x * _spread(flat, kept, left).astype(sums)).astype(x.dtype)
            y = jnp.einsum(equation, x, weight.codes.astype(x.dtype), preferred_element_type=sums)
            return y.astype(dtype)
    return jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=sums).astype(dtype)


def _on_gpu(equation: str, dtype: Any, x: Array, weight: QuantisedWeight) -> Array:
    """The same, with a kernel for few rows times codes of four bits: XLA would write the operand out.

    With one row times a small matrix of int8, it would write out float32 products of both: there are more rows then.
    """
    found = _as_matrix(equation, x, weight)
    if found is None or len(found.rows) > (grouped_product.ROWS if weight.packed else 1):
        return _fused(equation, dtype, x, weight)
    if not weight.packed:
        more = jnp.pad(found.rows, ((0, _MORE_ROWS - 1), (0, 0)))
        y = _fused("ab,cb->ac" if found.outputs_first else "ab,bc->ac", dtype, more, found.weight)
        return y[:1].reshape(found.shape)
    codes, offsets, scales = found.weight.codes, found.weight.offsets, found.weight.factors(jnp.bfloat16)
    known = {"outputs_first": found.outputs_first, "implementation": "triton"}
    y = api.grouped_product(found.rows.astype(x.dtype), codes, offsets, scales, **known)
    return y.reshape(found.shape).astype(dtype)


def _spread(scales: Array, letters: Sequence[str], over: str) -> Array:
    """Scales with the axes `letters`, to be multiplied with an array whose axes are `over`."""
    order = sorted(range(len(letters)), key=lambda i: over.index(letters[i]))
    sizes = {letters[i]: scales.shape[i] for i in order}
    return scales.transpose(order).reshape([sizes.get(letter, 1) for letter in over])


def _on_cpu(equation: str, dtype: Any, x: Array, weight: QuantisedWeight) -> Array:
    """The same, with no dequantised weight larger than a block where there are few rows."""
    found = _as_matrix(equation, x, weight)
    if found is None:
        return _fused(equation, dtype, x, weight)
    rows = found.rows.astype(accumulator(x.dtype))
    y = _by_outputs(rows, found.weight) if found.outputs_first else _by_inputs(rows, found.weight)
    return y.reshape(found.shape).astype(dtype)


class _Product(NamedTuple):
    """A product as one of two matrices, on one device."""

    rows: Float[Array, "R n"]
    weight: QuantisedWeight
    outputs_first: bool
    shape: tuple[int, ...]  # of the result


def _as_matrix(equation: str, x: Array, weight: QuantisedWeight) -> _Product | None:
    """None where each head has a part of the weight, or each device."""
    left, right, out = _letters(equation)
    summed = [letter for letter in right if letter not in out]
    rows = left.removesuffix("".join(summed))
    outputs = [letter for letter in right if letter in out]
    mesh = jax.sharding.get_abstract_mesh()
    if rows + "".join(summed) != left or rows + "".join(outputs) != out or not (mesh.empty or mesh.size == 1):
        return None
    count, width = len(summed), x.ndim - len(summed)
    flat = x.reshape(math.prod(x.shape[:width]), math.prod(x.shape[width:]))
    sizes = dict(zip(right, weight.shape, strict=True))
    shape = (*x.shape[:width], *(sizes[letter] for letter in outputs))
    if [*summed, *outputs] == list(right):
        return _Product(flat, _matrix(weight, count), False, shape)
    if [*outputs, *summed] == list(right) and count == 1:
        return _Product(flat, _matrix(weight, weight.ndim - 1), True, shape)
    return None


def _matrix(weight: QuantisedWeight, split: int) -> QuantisedWeight:
    """The weight with two axes: those before `split`, and the others."""
    return weight.merged(split, weight.ndim).merged(0, split)


def _pieces(x: Float[Array, "R n"], weight: QuantisedWeight) -> Iterator[tuple[Array, Array]]:
    """Activations and the dequantised weights that they meet: all, or those of half of every byte, and the offsets."""
    if not weight.packed:
        yield x, weight.astype(x.dtype)
        return
    halves = x.reshape(len(x), weight.scales.shape[weight.axis], 2, -1)
    for i, nibbles in enumerate((weight.codes & 15, weight.codes >> 4)):
        half = dataclasses.replace(weight, codes=nibbles.astype(jnp.int8))
        yield halves[:, :, i].reshape(len(x), -1), half.without_offsets(x.dtype)
    yield jnp.sum(halves, axis=(2, 3)), (weight.shifts(x.dtype) - 8) * weight.factors(x.dtype)


def _by_inputs(x: Float[Array, "R n"], weight: QuantisedWeight) -> Float[Array, "R m"]:
    """`x` times a weight [n, m]: some rows of codes at a time, where `x` has few."""
    if len(x) > _FEW_ROWS or x.shape[1] == 0:
        return sum((part @ dense for part, dense in _pieces(x, weight)), jnp.zeros((), x.dtype))
    (count, width), grouped = weight.shape, weight.offsets is not None
    group = count // len(weight.scales) if grouped else math.gcd(count, _ROWS)
    step = group * _at_a_time(count // group, group * width)

    def add(i: Array, total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(x, i * step, step, axis=1)
        if not grouped:
            return total + part @ _block(weight.codes, i, step).astype(x.dtype)
        block = jax.tree.map(lambda leaf: _block(leaf, i, len(leaf) * step // count), weight)
        return sum((piece @ dense for piece, dense in _pieces(part, block)), total)

    total = jax.lax.fori_loop(0, count // step, add, jnp.zeros((len(x), width), x.dtype))
    return total if grouped else total * weight.factors(x.dtype)


def _at_a_time(count: int, size: int) -> int:
    """How many of `count` parts of a weight, of `size` each, one step of a loop dequantises: they stay in the cache."""
    return max(n for n in range(1, max(1, min(count, _CODES_AT_A_TIME // size)) + 1) if count % n == 0)


def _block(x: Array, index: Array, size: int) -> Array:
    """One of the blocks of so many rows."""
    return jax.lax.dynamic_slice_in_dim(x, index * size, size)


def take_rows(table: Any, ids: Int[Array, "*B"], dtype: Any) -> Float[Array, "*B E"]:
    """Rows of a table of embeddings of either kind."""

    def take(leaf: Array) -> Array:
        leaf = constrain(leaf, "vocab", "activation_embed")  # rows lie whole where they are looked up
        return jnp.take(leaf, ids, axis=0)

    rows = jax.tree.map(take, table) if isinstance(table, QuantisedWeight) else take(table)
    return rows.astype(dtype)


def _by_outputs(x: Float[Array, "R n"], weight: QuantisedWeight) -> Float[Array, "R m"]:
    """`x` times a weight [m, n], such as a table of embeddings: some of its rows at a time, where `x` has few."""
    if len(x) > _FEW_ROWS:
        return sum((part @ dense.T for part, dense in _pieces(x, weight)), jnp.zeros((), x.dtype))
    size = _at_a_time(*weight.shape)

    def block(part: QuantisedWeight) -> Array:
        pieces = _pieces(x, part)
        return sum((jnp.einsum("rn,mn->mr", part, dense) for part, dense in pieces), jnp.zeros((), x.dtype))

    cut = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), weight)
    return jax.lax.map(block, cut).reshape(-1, len(x)).T
