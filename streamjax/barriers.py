"""What keeps XLA's CPU compiler from moving work to where it costs more; other platforms get the arrays as they are.

An `optimization_barrier` does not do it: this compiler drops barriers before it fuses.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped


def ordered_after(x: Shaped[Array, "B ..."], *made: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """`x`, a mask or a count, made to depend on `made`, so that a write that uses `x` comes after the reads of `made`.

    `made` are signed: of an unsigned number one asks in vain whether it is below -1.

    The CPU compiler keeps a donated buffer in place only if data flows from the reads of it to the write; otherwise it
    copies the whole buffer first. The dependence asks whether a number is above 1 and below -1. None is, so `x` never
    changes, but the compiler does not know that.
    """

    def depend(x: Array, *made: Array) -> Array:
        for y in made:
            first = y[..., 0]
            x = jnp.where(((first > 1) & (first < -1)).any(), jnp.zeros_like(x), x)
        return x

    return jax.lax.platform_dependent(x, *made, cpu=depend, default=lambda x, *made: x)


def materialized_once(tree: Any, count: Int32[Array, "..."]) -> Any:
    """`tree`, computed once, before anything uses it. `count` is any array without negative numbers.

    The CPU compiler computes things again at each use: a read of a buffer behind the write that overwrites its tokens,
    for which it copies the whole buffer; a cosine for each head that it turns. So they stand in a branch that the
    compiler cannot decide, and through which it does not look.
    """

    def branch(tree: Any, count: Array) -> Any:
        return jax.lax.cond((count >= 0).all(), lambda x: x, lambda x: jax.tree.map(jnp.zeros_like, x), tree)

    return jax.lax.platform_dependent(tree, count, cpu=branch, default=lambda tree, count: tree)
