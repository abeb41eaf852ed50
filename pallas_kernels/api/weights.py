"""Products with weights in few bits."""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.api.platforms import Implementation, find
from pallas_kernels.gpu import grouped_product as gpu_product

_PRODUCTS = {"triton": gpu_product.grouped_product}


@partial(jax.jit, static_argnames=("outputs_first", "splits", "implementation", "interpret"))
def grouped_product(
    x: Float[Array, "R n"],
    codes: UInt8[Array, "..."],
    offsets: Int8[Array, "..."],
    scales: Float[Array, "..."],
    *,
    outputs_first: bool = False,
    splits: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "R m"]:
    """A few rows times the matrix [n, m] of `(code - 8 + offset / 16) * scale`, in float32; the codes are read once.

    Args:
      x: up to 16 rows.
      codes: [n / 2, m], two in a byte. Lower halves of a group's bytes are its first codes, upper halves the others.
      offsets: [n / group, m]; groups are powers of two, up to 128.
      scales: [n / group, m].
      outputs_first: codes, offsets and scales are transposed, [m, ...], as those of a table of embeddings.
      splits: shares of the inputs that programs of their own take; as many as fill the GPU where None.
      implementation: "triton"; where None, the platform's, of which only GPUs have one.
      interpret: run it in an interpreter, on any platform.

    Raises:
      ValueError: more rows than 16, other groups, or no kernel for the platform.
    """
    run = find(_PRODUCTS, "grouped_product", "triton" if interpret else implementation)
    known = {"outputs_first": outputs_first, "splits": splits, "interpret": interpret}
    product: Array = run(x, codes, offsets, scales, **known)
    return product
