"""One block of C tokens of a recurrence over a matrix state, in products of matrices: the core of all its kernels.

A head's state S is `[K, V]`; here it lies as `[V, K]`, so that decays of channels stand along its rows. All is written
for two decays: one a head, and one for each channel of a key. All is float32; products round what they multiply to
`Products.dtype` and sum in float32. Decays come as logarithms at most 0, and only sums of them become exponentials, so
nothing overflows.

With the delta rule what a token writes depends on what those before it wrote: `(1 + M) u = beta (v - S^T k)`, with M
strictly lower. 1 + M is inverted by halves: the inverse of `[[A, 0], [B, D]]` has `-D^-1 B A^-1` below, from blocks of
1 up. That is as stable as substitution, where powers of M would grow, and it takes masks and products alone, which both
compilers have. Decays of channels go the same way: of a pair of tokens in two halves, both are decayed up to the border
between the halves, which is a sum of decays for each, and never a difference.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32


class Operands(NamedTuple):
    """What both platforms' kernels are given: N blocks of C tokens, T = N C; heads are the R of each of G groups.

    decay: of heads, logarithms summed from each block's start on, as far as `coarse` has not got them; of channels,
    those of single tokens. coarse: of heads, in whole steps of `COARSE`; what products are made for has no derivative
    by it. segments: as in `Segments`, for each block. state: in front of the tokens.
    """

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T G R V"]
    decay: Float[Array, "B N G R C"] | Float[Array, "B T G R K"]
    coarse: Float[Array, "B N G R C"] | None
    beta: Float[Array, "B N G R C"] | None
    segments: Int32[Array, "B N C"] | None
    state: Float[Array, "B G R V K"]


_DIMENSIONS = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}
NEVER = -1e30  # the logarithm of a decay to 0
COARSE = 2.0**-8  # whole steps of it are exact in float32 up to 65,536, and so are their differences


class Products(NamedTuple):
    """Products of matrices, plain or with one or the other transposed (`nn`, `nt`, `tn`), of operands in `dtype`.

    differentiable: for `jax.vjp` in a kernel; cotangents are rounded to `dtype` as operands are.
    """

    dtype: Any
    differentiable: bool = False

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
        return (_differentiable_sums if self.differentiable else _sums)("nn", jnp.where(taken, 1.0, 0.0), steps)

    def _product(self, kind: str, a: Array, b: Array) -> Array:
        return (_differentiable_product if self.differentiable else _product)(kind, self.dtype, a, b)


def _product(kind: str, dtype: Any, a: Array, b: Array) -> Array:
    whole = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    operands = a.astype(dtype), b.astype(dtype)
    dimensions = (_DIMENSIONS[kind], ((), ()))
    return lax.dot_general(*operands, dimensions, precision=whole, preferred_element_type=jnp.float32)


_differentiable_product = jax.custom_vjp(_product, nondiff_argnums=(0, 1))


def _product_forward(kind: str, dtype: Any, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(kind, dtype, a, b), (a, b)


def _product_backward(kind: str, dtype: Any, kept: tuple[Array, Array], given: Array) -> tuple[Array, Array]:
    a, b = kept
    if kind == "nn":
        return _product("nt", dtype, given, b), _product("tn", dtype, a, given)
    if kind == "nt":
        return _product("nn", dtype, given, b), _product("tn", dtype, given, a)
    return _product("nt", dtype, b, given), _product("nn", dtype, a, given)


_differentiable_product.defvjp(_product_forward, _product_backward)


def _inverse(dtype: Any, below: Float[Array, "C C"]) -> Float[Array, "C C"]:
    size = below.shape[0]
    row, column = _places(size)
    found = jnp.where(row == column, 1.0, jnp.where(_met_at(0, size), -below, 0.0))
    for level in range(1, _levels(size)):
        part = _product("nn", dtype, jnp.where(_met_at(level, size), below, 0.0), found)
        found = found - _product("nn", dtype, found, part)
    return found


_differentiable_inverse = jax.custom_vjp(_inverse, nondiff_argnums=(0,))


def _inverse_forward(dtype: Any, below: Array) -> tuple[Array, Array]:
    found = _inverse(dtype, below)
    return found, found


def _inverse_backward(dtype: Any, found: Array, given: Array) -> tuple[Array]:
    row, column = _places(found.shape[0])
    whole = _product("nt", dtype, _product("tn", dtype, found, given), found)
    return (jnp.where(row > column, -whole, 0.0),)


_differentiable_inverse.defvjp(_inverse_forward, _inverse_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _known_inverse(dtype: Any, below: Float[Array, "C C"], known: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """The inverse of 1 + `below` where it has been made before."""
    return known


def _known_inverse_backward(dtype: Any, known: Array, given: Array) -> tuple[Array, Array]:
    return *_inverse_backward(dtype, known, given), jnp.zeros_like(known)


_known_inverse.defvjp(lambda dtype, below, known: (known, known), _known_inverse_backward)


def _sums(kind: str, ones: Array, x: Array) -> Array:
    """A product with zeros and ones: three of bfloat16, whose digits together are those of float32."""
    high = x.astype(jnp.bfloat16)
    rest = x - high.astype(jnp.float32)
    middle = rest.astype(jnp.bfloat16)
    low = rest - middle.astype(jnp.float32)
    low, middle, high = (_product(kind, jnp.bfloat16, ones, part) for part in (low, middle, high))
    return (low + middle) + high


_differentiable_sums = jax.custom_vjp(_sums, nondiff_argnums=(0,))


def _sums_forward(kind: str, ones: Array, x: Array) -> tuple[Array, Array]:
    return _sums(kind, ones, x), ones


def _sums_backward(kind: str, ones: Array, given: Array) -> tuple[Array, Array]:
    return jnp.zeros_like(ones), _sums("tn", ones, given)


_differentiable_sums.defvjp(_sums_forward, _sums_backward)


class HeadDecay(NamedTuple):
    """A decay a head: logarithms summed from the block's start on, as a row and as a column, or so many equal columns.

    So may `beta` be: one column, or as many as what it multiplies has. Sums are of two parts, coarse and fine, as a
    difference of two sums would else be rounded as the sums are: wrong by 1e-3 where a block decays by e^-10000.
    """

    column: Float[Array, "C _"]
    row: Float[Array, "1 C"]
    coarse_column: Float[Array, "C _"]
    coarse_row: Float[Array, "1 C"]


class ChannelDecay(NamedTuple):
    """A decay for each channel of a key: logarithms of single tokens."""

    steps: Float[Array, "C K"]


class Segments(NamedTuple):
    """How many tokens of a block up to each one begin with an empty state."""

    column: Int32[Array, "C 1"]
    row: Int32[Array, "1 C"]


class Weights(NamedTuple):
    """What a block's tokens and its first state weigh.

    pairs: of an earlier token for a later one or itself: of a head; or of channels, for each level at which two halves
    meet, what is left of a token at the border between them. start: of the first state for a token. end: of a token in
    the last state. whole: of the first state in the last.
    """

    pairs: Any
    start: Float[Array, "C D"]
    end: Float[Array, "C D"]
    whole: Float[Array, "1 D"]


def weights(products: Products, decay: HeadDecay | ChannelDecay, segments: Segments | None) -> Weights:
    size = decay[0].shape[0]
    row, column = _places(size)
    if isinstance(decay, HeadDecay):
        at = lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        coarse, fine = decay.coarse_column, decay.column
        top, rest = (jnp.sum(jnp.where(at == size - 1, x, 0.0), axis=0, keepdims=True) for x in (coarse, fine))
        start, end, whole = coarse + fine, (top - coarse) + (rest - fine), top + rest
        between = (coarse - decay.coarse_row) + (fine - decay.row)
        pairs: Any = jnp.exp(jnp.where(row >= column, between, NEVER))
    else:
        whole = jnp.sum(decay.steps, axis=0, keepdims=True)
        start, end = (products.sums(taken, decay.steps) for taken in (row >= column, row < column))
        pairs = tuple(jnp.exp(products.sums(_up_to_border(level, size), decay.steps)) for level in range(_levels(size)))
    if segments is not None:
        last = jnp.max(segments.row, axis=1, keepdims=True)
        start = jnp.where(segments.column == 0, start, NEVER)
        end = jnp.where(segments.column == last, end, NEVER)
        whole = jnp.where(last == 0, whole, NEVER)
    return Weights(pairs, jnp.exp(start), jnp.exp(end), jnp.exp(whole))


def scores(
    products: Products,
    a: Float[Array, "C K"],
    k: Float[Array, "C K"],
    found: Weights,
    segments: Segments | None,
    diagonal: bool,
) -> Float[Array, "C C"]:
    """Products of each `a` with the keys before it and, with `diagonal`, its own, each decayed on its way."""
    size = a.shape[0]
    row, column = _places(size)
    if not isinstance(found.pairs, tuple):
        whole = products.nt(a, k) * found.pairs
        whole = whole if diagonal else jnp.where(row > column, whole, 0.0)
    else:
        own = jnp.sum(a * k, axis=1, keepdims=True) if diagonal else jnp.zeros((size, 1), jnp.float32)
        whole = jnp.where(row == column, own, 0.0)
        for level, left in enumerate(found.pairs):
            second = _second_half(level, lax.broadcasted_iota(jnp.int32, (size, 1), 0))
            met = products.nt(jnp.where(second, a * left, 0.0), jnp.where(second, 0.0, k * left))
            whole = whole + jnp.where(_met_at(level, size), met, 0.0)
    return whole if segments is None else jnp.where(segments.column == segments.row, whole, 0.0)


def erasing(
    products: Products,
    k: Float[Array, "C K"],
    beta: Float[Array, "C _"],
    found: Weights,
    segments: Segments | None,
    known: Float[Array, "C C"] | None = None,
) -> Float[Array, "C C"]:
    """The inverse of 1 + M: what each token of the block writes, from what all would write behind the first state.

    known: it was made before, and is wanted with its derivatives.
    """
    return products.inverse(beta * scores(products, k, k, found, segments, diagonal=False), known)


def written(
    products: Products,
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    beta: Float[Array, "C _"],
    inverse: Float[Array, "C C"],
    found: Weights,
    state: Float[Array, "V K"],
) -> Float[Array, "C V"]:
    """What the delta rule adds to the state with each token's key."""
    return products.nn(inverse, beta * (v - products.nt(k * found.start, state)))


def next_state(
    products: Products, k: Float[Array, "C K"], values: Float[Array, "C V"], found: Weights, state: Float[Array, "V K"]
) -> Float[Array, "V K"]:
    return found.whole * state + products.tn(values, k * found.end)


def read(
    products: Products,
    q: Float[Array, "C K"],
    pairs: Float[Array, "C C"],
    values: Float[Array, "C V"],
    found: Weights,
    state: Float[Array, "V K"],
) -> Float[Array, "C V"]:
    """What each token reads of the first state and of what the block has written up to it."""
    return products.nt(q * found.start, state) + products.nn(pairs, values)


def block(
    products: Products,
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    decay: HeadDecay | ChannelDecay,
    beta: Float[Array, "C _"] | None,
    state: Float[Array, "V K"],
    segments: Segments | None = None,
) -> tuple[Float[Array, "C V"], Float[Array, "V K"]]:
    """What C tokens of a head read, and the state behind them."""
    found = weights(products, decay, segments)
    values = v
    if beta is not None:
        values = written(products, k, v, beta, erasing(products, k, beta, found, segments), found, state)
    pairs = scores(products, q, k, found, segments, diagonal=True)
    return read(products, q, pairs, values, found, state), next_state(products, k, values, found, state)


def _places(size: int) -> tuple[Int32[Array, "C C"], Int32[Array, "C C"]]:
    return tuple(lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))  # type: ignore[return-value]


def _levels(size: int) -> int:
    return size.bit_length() - 1


def _second_half(level: int, place: Array) -> Array:
    """Whether places are in the second half of their block of 2^(level + 1)."""
    return (place >> level) & 1 == 1


def _met_at(level: int, size: int) -> Array:
    """The pairs of a token in the second half of a block of 2^(level + 1) with one in its first."""
    row, column = _places(size)
    return ((row >> level) ^ (column >> level) == 1) & (row > column)


def _up_to_border(level: int, size: int) -> Array:
    """The tokens between each token and the border of its block's halves: itself in the second, not in the first."""
    row, column = _places(size)
    beside = jnp.where(_second_half(level, row), row >= column, row < column)
    return (row >> level == column >> level) & beside
