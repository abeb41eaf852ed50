"""Parameters of layers: drawn kernels and zero biases.

Every parameter is an `nnx.Param` that names its dimensions (`axes=`), for `streamjax.parallel`. Kernels are stored
input-major (`[in, out]`), the layout that a one-row product reads fastest. Weights are cast to the dtype of their
input where they are used, so master weights can be float32 under bfloat16 activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator


def product(equation: str, x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """`einsum` of activations and a weight in the activations' dtype, accumulated and rounded once.

    The accumulator's dtype is asked for by name: the CPU's compiler has kernels of bfloat16 only for products that end
    in float32, and converts the operands of others. They take half the time.
    """
    dtype = accumulator(x.dtype)
    return jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=dtype).astype(x.dtype)


def kernel(
    key: Array, shape: Sequence[int], axes: Sequence[str], fan_in: int, dtype: jnp.dtype, gain: float = 1.0
) -> nnx.Param:
    """A weight drawn from a normal truncated at two deviations, of standard deviation `gain / sqrt(fan_in)`."""
    value = jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape), jnp.float32) * (gain / (0.88 * math.sqrt(fan_in)))
    return nnx.Param(value.astype(dtype), axes=tuple(axes))


def zeros(shape: Sequence[int], axes: Sequence[str], dtype: jnp.dtype) -> nnx.Param:
    """A parameter of zeros: a bias."""
    return nnx.Param(jnp.zeros(tuple(shape), dtype), axes=tuple(axes))
