"""One block of C tokens of a recurrence over a matrix state, in products of matrices: the core of all its kernels.

A head's state S is `[K, V]`; here it lies as `[V, K]`, so that decays of channels stand along its rows. All is written
for two decays: one a head, and one for each channel of a key. All is float32; products round what they multiply to
`Products.dtype` and sum in float32. Decays come as logarithms at most 0, and only sums of them become exponentials, so
nothing overflows.

With the delta rule what a token writes depends on what those before it wrote: `(1 + M) u = beta (v - S^T k)`, with M
strictly lower. 1 + M is inverted by halves (`recurrence_products.py`). Decays of channels go the same way: of a pair of
tokens in two halves, both are decayed up to the border between the halves, which is a sum of decays for each, and never
a difference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.recurrence_products import Products, levels, met_at, places, product, second_half, sums


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


NEVER = -1e30  # the logarithm of a decay to 0
COARSE = 2.0**-8  # whole steps of it are exact in float32 up to 65,536, and so are their differences


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
    meet, what is left of a token at the border between them, or the decays, of which a loop over levels makes it.
    start: of the first state for a token. end: of a token in the last state. whole: of the first state in the last.
    """

    pairs: Any
    start: Float[Array, "C D"]
    end: Float[Array, "C D"]
    whole: Float[Array, "1 D"]


def weights(products: Products, decay: HeadDecay | ChannelDecay, segments: Segments | None) -> Weights:
    size = decay[0].shape[0]
    row, column = places(size)
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
        left = (jnp.exp(products.sums(_up_to_border(level, size), decay.steps)) for level in range(levels(size)))
        pairs = decay if products.rolled else tuple(left)
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
    row, column = places(size)
    if not isinstance(found.pairs, tuple):
        whole = products.nt(a, k) * found.pairs
        whole = whole if diagonal else jnp.where(row > column, whole, 0.0)
    else:
        own = jnp.sum(a * k, axis=1, keepdims=True) if diagonal else jnp.zeros((size, 1), jnp.float32)
        whole = jnp.where(row == column, own, 0.0)
        if isinstance(found.pairs, ChannelDecay):
            met = _differentiable_met_in_loop if products.differentiable else _met_in_loop
            whole = whole + met(products.dtype, a, k, found.pairs.steps)
        else:
            for level, left in enumerate(found.pairs):
                whole = whole + _met(products, level, a, k, left)
    return whole if segments is None else jnp.where(segments.column == segments.row, whole, 0.0)


def _met(products: Products, level: Any, a: Array, k: Array, left: Float[Array, "C K"]) -> Float[Array, "C C"]:
    """Of a level's pairs, the products of `a` and a key, both decayed up to the border between their halves."""
    size = a.shape[0]
    second = second_half(level, lax.broadcasted_iota(jnp.int32, (size, 1), 0))
    met = products.nt(jnp.where(second, a * left, 0.0), jnp.where(second, 0.0, k * left))
    return jnp.where(met_at(level, size), met, 0.0)


def _met_in_loop(dtype: Any, a: Array, k: Array, steps: Float[Array, "C K"]) -> Float[Array, "C C"]:
    """Of all levels."""
    size = a.shape[0]

    def add(level: Any, whole: Array) -> Array:
        left = jnp.exp(sums("nn", jnp.where(_up_to_border(level, size), 1.0, 0.0), steps))
        return whole + _met(Products(dtype), level, a, k, left)

    return lax.fori_loop(0, levels(size), add, jnp.zeros((size, size), jnp.float32))


_differentiable_met_in_loop = jax.custom_vjp(_met_in_loop, nondiff_argnums=(0,))


def _met_in_loop_backward(
    dtype: Any, kept: tuple[Array, Array, Array], given: Float[Array, "C C"]
) -> tuple[Array, Array, Array]:
    """A level at a time again: what is left of a token is made anew."""
    a, k, steps = kept
    size = a.shape[0]

    def add(level: Any, total: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_a, d_k, d_steps = total
        ones = jnp.where(_up_to_border(level, size), 1.0, 0.0)
        second = second_half(level, lax.broadcasted_iota(jnp.int32, (size, 1), 0))
        left, met = jnp.exp(sums("nn", ones, steps)), jnp.where(met_at(level, size), given, 0.0)
        own = product(
            "nn", dtype, met, jnp.where(second, 0.0, k * left)
        )  # 0 in first halves, as `met` has no rows there
        other = product("tn", dtype, met, jnp.where(second, a * left, 0.0))  # and 0 in second halves
        d_left = own * a + other * k
        return d_a + own * left, d_k + other * left, d_steps + sums("tn", ones, d_left * left)

    return lax.fori_loop(0, levels(size), add, tuple(jnp.zeros_like(x) for x in kept))


_differentiable_met_in_loop.defvjp(lambda dtype, *given: (_met_in_loop(dtype, *given), given), _met_in_loop_backward)


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


def _up_to_border(level: int, size: int) -> Array:
    """The tokens between each token and the border of its block's halves: itself in the second, not in the first."""
    row, column = places(size)
    beside = jnp.where(second_half(level, row), row >= column, row < column)
    return (row >> level == column >> level) & beside
