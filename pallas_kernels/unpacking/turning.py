"""Turning keys by their positions inside a kernel: cosine and sine of a phase whose whole turn is 2^32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

_SIN = [(-1) ** i / math.factorial(2 * i + 1) for i in range(6)]
_COS = [(-1) ** i / math.factorial(2 * i) for i in range(7)]


def cos_sin(phase: Int32[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """To 3e-7, by products and sums alone, which every compiler has.

    Series of half the angle, which is at most a quarter of a turn: cos 2y = 1 - 2 sin^2 y, sin 2y = 2 sin y cos y.

    >>> [round(float(x), 6) for x in cos_sin(jnp.int32(2**29))]
    [0.707107, 0.707107]
    """
    half = phase.astype(jnp.float32) * jnp.float32(math.pi / 2**32)
    square = half * half
    sin, cos = half * _series(_SIN, square), _series(_COS, square)
    return 1.0 - 2.0 * (sin * sin), 2.0 * (sin * cos)


def _series(terms: list[float], x: jax.Array) -> jax.Array:
    total = jnp.full_like(x, terms[-1])
    for term in terms[-2::-1]:
        total = total * x + term
    return total
