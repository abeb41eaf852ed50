"""Parameters of layers: drawn kernels and zero biases.

Every parameter is an `nnx.Param` that names its dimensions (`axes=`), for `streamjax.parallel`. Kernels are stored
input-major (`[in, out]`), the layout that a one-row product reads fastest. Weights are cast to the dtype of their
input where they are used, so master weights can be float32 under bfloat16 activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.models.quantisation import QuantisedWeight, quantised_product


def product(
    equation: str, x: Float[Array, "..."], weight: Float[Array, "..."] | QuantisedWeight, dtype: Any = None
) -> Float[Array, "..."]:
    """`einsum` of activations and a weight in the activations' dtype, accumulated and rounded once.

    The result has the activations' dtype where `dtype` is None.

    The accumulator's dtype is asked for by name: the CPU's compiler has kernels of bfloat16 only for products that end
    in float32, and converts the operands of others. They take half the time.
    """
    dtype = x.dtype if dtype is None else dtype
    if isinstance(weight, QuantisedWeight):
        return quantised_product(equation, x, weight, dtype)
    sums = accumulator(x.dtype)
    return jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=sums).astype(dtype)


def kernel(
    key: Array,
    shape: Sequence[int],
    axes: Sequence[str],
    fan_in: int,
    dtype: jnp.dtype,
    gain: float = 1.0,
    inputs: tuple[int, ...] = (0,),
) -> nnx.Param:
    """A weight drawn from a normal truncated at two deviations, of standard deviation `gain / sqrt(fan_in)`.

    `inputs` are the axes that a product sums over, and what quantising goes by (`models/quantising.py`); without any
    the weight is never quantised.
    """
    value = jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape), jnp.float32) * (gain / (0.88 * math.sqrt(fan_in)))
    return nnx.Param(value.astype(dtype), axes=tuple(axes), inputs=inputs)


def zeros(shape: Sequence[int], axes: Sequence[str], dtype: jnp.dtype) -> nnx.Param:
    """A parameter of zeros: a bias."""
    return nnx.Param(jnp.zeros(tuple(shape), dtype), axes=tuple(axes))
