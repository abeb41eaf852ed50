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
from jaxtyping import Array


def kernel(
    key: Array, shape: Sequence[int], axes: Sequence[str], fan_in: int, dtype: jnp.dtype, gain: float = 1.0
) -> nnx.Param:
    """A weight drawn from a normal truncated at two deviations, of standard deviation `gain / sqrt(fan_in)`."""
    value = jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape), jnp.float32) * (gain / (0.88 * math.sqrt(fan_in)))
    return nnx.Param(value.astype(dtype), axes=tuple(axes))


def zeros(shape: Sequence[int], axes: Sequence[str], dtype: jnp.dtype) -> nnx.Param:
    """A parameter of zeros: a bias."""
    return nnx.Param(jnp.zeros(tuple(shape), dtype), axes=tuple(axes))
