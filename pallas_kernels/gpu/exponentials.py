"""Exponentials and soft caps on GPUs, in as few instructions as they take: every one counts beside `wgmma`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tile_logits import LOG2E

# Of a logit that does not count. A power of two, so that its product with a scale is exact in a fused multiply-add and
# the same without one; finite: the difference of two of them is 0, not NaN.
MASKED = -(2.0**100)
_EXP2 = "ex2.approx.ftz.f32 $0, $0;"


def exp2(x: jax.Array, factor: float, shift: jax.Array, interpreted: bool) -> jax.Array:
    """`2 ** (factor * x - shift)` of float32 numbers, 0 where that is below 2^-126; `shift` broadcasts.

    Two instructions. The compiler's own are six: the product and the difference apart, and for `exp2` a comparison and
    two products more that keep subnormal results, which no sum of weights notices. Interpreters have no PTX.
    """
    if interpreted:
        return jnp.exp2(factor * x - shift)
    return _run(f"fma.rn.f32 $0, $1, {_number(factor)}, $2; {_EXP2}", x, jnp.broadcast_to(-shift, x.shape))


def tanh(dtype: Any, interpreted: bool) -> Callable[[jax.Array], jax.Array]:
    """The function for the soft cap of logits whose queries and keys are of `dtype`.

    For bfloat16 it is `1 - 2 / (exp(2 x) + 1)`, five instructions, right to 3e-7 of 1: more than products of bfloat16
    are. A GPU's own, `tanh.approx`, is right to three digits, and the compiler's takes twenty.
    """
    if dtype == jnp.float32:
        return jnp.tanh

    def found(x: jax.Array) -> jax.Array:
        if interpreted:
            return 1.0 - 2.0 / (jnp.exp2(2.0 * LOG2E * x) + 1.0)
        return _run(
            f"mul.f32 $0, $1, {_number(2.0 * LOG2E)}; {_EXP2} add.f32 $0, $0, {_number(1.0)}; "
            f"rcp.approx.ftz.f32 $0, $0; fma.rn.f32 $0, $0, {_number(-2.0)}, {_number(1.0)};",
            x,
        )

    return found


def _number(x: float) -> str:
    """A float32 number as PTX writes it."""
    return f"0f{np.float32(x).view(np.uint32):08X}"


def _run(ptx: str, *args: jax.Array) -> jax.Array:
    """Float32 numbers by instructions for each of them, `$1` and on; the result is `$0`."""
    [found] = plgpu.elementwise_inline_asm(
        ptx,
        args=args,
        constraints=",".join(["=f", *["f"] * len(args)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return found
