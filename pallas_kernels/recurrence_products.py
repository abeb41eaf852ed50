"""Products of matrices in kernels of recurrences, with derivatives that both platforms' compilers take.

They are of operands in one dtype, summed in float32. 1 + M of a strictly lower M is inverted by halves: the inverse of
`[[A, 0], [B, D]]` has `-D^-1 B A^-1` below, from blocks of 1 up. That is as stable as substitution, where powers of M
would grow, and it takes masks and products alone, which both compilers have.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

_DIMENSIONS = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}


class Products(NamedTuple):
    """Products of matrices, plain or with one or the other transposed (`nn`, `nt`, `tn`), of operands in `dtype`.

    differentiable: for `jax.vjp` in a kernel; cotangents are rounded to `dtype` as operands are.
    rolled: pairs under decays of channels are made level by level in a loop, for a compiler whose registers cannot hold
    all levels at once.
    """

    dtype: Any
    differentiable: bool = False
    rolled: bool = False

    def nn(self, a: Array, b: Array) -> Array:
        return self._product("nn", a, b)

    def nt(self, a: Array, b: Array) -> Array:
        return self._product("nt", a, b)

    def tn(self, a: Array, b: Array) -> Array:
        return self._product("tn", a, b)

    def inverse(self, below: Float[Array, "C C"], known: Float[Array, "C C"] | None = None) -> Float[Array, "C C"]:
        """The inverse of 1 + `below`, which is strictly lower; C is a power of two. known: it, where it is there."""
        if known is not None:
            return _known_inverse(self.dtype, below, known)
        return (_differentiable_inverse if self.differentiable else _inverse)(self.dtype, below)

    def sums(self, taken: Bool[Array, "C C"], steps: Float[Array, "C K"]) -> Float[Array, "C K"]:
        """For each token, of the steps of those that are `taken`, as float32 sums them."""
        return (_differentiable_sums if self.differentiable else sums)("nn", jnp.where(taken, 1.0, 0.0), steps)

    def _product(self, kind: str, a: Array, b: Array) -> Array:
        return (_differentiable_product if self.differentiable else product)(kind, self.dtype, a, b)


def product(kind: str, dtype: Any, a: Array, b: Array) -> Array:
    """A product of what `a` and `b` are in `dtype`, summed in float32."""
    whole = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    operands = a.astype(dtype), b.astype(dtype)
    dimensions = (_DIMENSIONS[kind], ((), ()))
    return lax.dot_general(*operands, dimensions, precision=whole, preferred_element_type=jnp.float32)


_differentiable_product = jax.custom_vjp(product, nondiff_argnums=(0, 1))


def _product_forward(kind: str, dtype: Any, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(kind, dtype, a, b), (a, b)


def _product_backward(kind: str, dtype: Any, kept: tuple[Array, Array], given: Array) -> tuple[Array, Array]:
    a, b = kept
    if kind == "nn":
        return product("nt", dtype, given, b), product("tn", dtype, a, given)
    if kind == "nt":
        return product("nn", dtype, given, b), product("tn", dtype, given, a)
    return product("nt", dtype, b, given), product("nn", dtype, a, given)


_differentiable_product.defvjp(_product_forward, _product_backward)


def _inverse(dtype: Any, below: Float[Array, "C C"]) -> Float[Array, "C C"]:
    size = below.shape[0]
    row, column = places(size)
    found = jnp.where(row == column, 1.0, jnp.where(met_at(0, size), -below, 0.0))
    for level in range(1, levels(size)):
        part = product("nn", dtype, jnp.where(met_at(level, size), below, 0.0), found)
        found = found - product("nn", dtype, found, part)
    return found


_differentiable_inverse = jax.custom_vjp(_inverse, nondiff_argnums=(0,))


def _inverse_forward(dtype: Any, below: Array) -> tuple[Array, Array]:
    found = _inverse(dtype, below)
    return found, found


def _inverse_backward(dtype: Any, found: Array, given: Array) -> tuple[Array]:
    row, column = places(found.shape[0])
    whole = product("nt", dtype, product("tn", dtype, found, given), found)
    return (jnp.where(row > column, -whole, 0.0),)


_differentiable_inverse.defvjp(_inverse_forward, _inverse_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _known_inverse(dtype: Any, below: Float[Array, "C C"], known: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """The inverse of 1 + `below` where it has been made before."""
    return known


def _known_inverse_backward(dtype: Any, known: Array, given: Array) -> tuple[Array, Array]:
    return *_inverse_backward(dtype, known, given), jnp.zeros_like(known)


_known_inverse.defvjp(lambda dtype, below, known: (known, known), _known_inverse_backward)


def sums(kind: str, ones: Array, x: Array) -> Array:
    """A product with zeros and ones: three of bfloat16, whose digits together are those of float32."""
    high = x.astype(jnp.bfloat16)
    rest = x - high.astype(jnp.float32)
    middle = rest.astype(jnp.bfloat16)
    low = rest - middle.astype(jnp.float32)
    low, middle, high = (product(kind, jnp.bfloat16, ones, part) for part in (low, middle, high))
    return (low + middle) + high


_differentiable_sums = jax.custom_vjp(sums, nondiff_argnums=(0,))


def _sums_forward(kind: str, ones: Array, x: Array) -> tuple[Array, Array]:
    return sums(kind, ones, x), ones


def _sums_backward(kind: str, ones: Array, given: Array) -> tuple[Array, Array]:
    return jnp.zeros_like(ones), sums("tn", ones, given)


_differentiable_sums.defvjp(_sums_forward, _sums_backward)


def places(size: int) -> tuple[Int32[Array, "C C"], Int32[Array, "C C"]]:
    return tuple(lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))  # type: ignore[return-value]


def levels(size: int) -> int:
    return size.bit_length() - 1


def second_half(level: int, place: Array) -> Array:
    """Whether places are in the second half of their block of 2^(level + 1)."""
    return (place >> level) & 1 == 1


def met_at(level: int, size: int) -> Array:
    """The pairs of a token in the second half of a block of 2^(level + 1) with one in its first."""
    row, column = places(size)
    return ((row >> level) ^ (column >> level) == 1) & (row > column)
