"""Exponentials of a softmax on GPUs, in as few instructions as they take: every instruction counts beside `wgmma`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

# Of a logit that does not count. A power of two, so that its product with a scale is exact in a fused multiply-add and
# the same without one; finite: the difference of two of them is 0, not NaN.
MASKED = -(2.0**100)


def exp2(x: jax.Array, factor: float, shift: jax.Array, interpreted: bool) -> jax.Array:
    """`2 ** (factor * x - shift)` of float32 numbers, 0 where that is below 2^-126; `shift` broadcasts.

    Two instructions. The compiler's own are six: the product and the difference apart, and for `exp2` a comparison and
    two products more that keep subnormal results, which no sum of weights notices. Interpreters have no PTX.
    """
    if interpreted:
        return jnp.exp2(factor * x - shift)
    number = f"0f{np.float32(factor).view(np.uint32):08X}"
    [found] = plgpu.elementwise_inline_asm(
        f"fma.rn.f32 $0, $1, {number}, $2; ex2.approx.ftz.f32 $0, $0;",
        args=[x, jnp.broadcast_to(-shift, x.shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return found
