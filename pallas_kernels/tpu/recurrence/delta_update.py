"""One token of the delta rule on TPUs: every state is read once and written once, in its place.

What a state holds under the key decides what is written, so a compiler reads it twice: for the sum over its rows, and
to change it. Here a program has some groups of heads in fast memory for both. Queries, keys and decays come as rows and
are turned into columns, which stand beside the rows of a state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

SUBLANES = 8  # rows of a tile
BLOCK = 512 * 1024  # bytes of states that a program has at once


def delta_update(
    q: Float[Array, "B G K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B G R V"],
    decay: Float[Array, "B G R K"],
    beta: Float[Array, "B G R"],
    state: Float[Array, "B G R K V"],
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "B G R V"], Float[Array, "B G R K V"]]:
    """`pallas_kernels.api.delta_update` on a TPU; see there for the arguments."""
    batch, groups, shared, keys, width = state.shape
    written = beta[..., None] * k[:, :, None]  # what a head's read counts for in what it writes
    rows = jnp.concatenate((q[:, :, None], k[:, :, None], decay, written), axis=2)
    count = -(-rows.shape[2] // SUBLANES) * SUBLANES
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, count - rows.shape[2]), (0, 0)))
    fit = max(1, BLOCK // (shared * keys * width * 4))
    size = next(size for size in range(min(fit, groups), 0, -1) if groups % size == 0)

    def spec(*shape: int) -> Any:
        return pl.BlockSpec((None, size, *shape), lambda b, g: (b, g, *(0,) * len(shape)))

    out, new = pl.pallas_call(
        _kernel,
        grid=(batch, groups // size),
        in_specs=[spec(count, keys), spec(shared, width), spec(shared, keys, width)],
        out_specs=[spec(shared, width), spec(shared, keys, width)],
        out_shape=[jax.ShapeDtypeStruct(v.shape, jnp.float32), jax.ShapeDtypeStruct(state.shape, jnp.float32)],
        input_output_aliases={2: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="delta_update",
    )(rows, beta[..., None] * v, state)
    return out, new


def _kernel(rows: Any, values: Any, state: Any, out: Any, new: Any) -> None:
    groups, shared = state.shape[:2]
    for group in range(groups):
        columns = rows[group].T  # [K, rows]
        q, k = columns[:, 0:1], columns[:, 1:2]
        for head in range(shared):
            decay, written = columns[:, 2 + head : 3 + head], columns[:, 2 + shared + head : 3 + shared + head]
            held = decay * state[group, head]
            value = values[group, head : head + 1] - jnp.sum(held * written, axis=0, keepdims=True)
            held = held + k * value
            new[group, head] = held
            out[group, head : head + 1] = jnp.sum(held * q, axis=0, keepdims=True)
