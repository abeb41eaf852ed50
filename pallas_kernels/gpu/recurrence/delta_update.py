"""One token of the delta rule on GPUs, in Triton: every state is read once and written once, in its place.

A program has some columns of a head's state in registers: columns do not see each other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

COLUMNS = 32  # of a state that a program has
WARPS = 4


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
    """`pallas_kernels.api.delta_update` on a GPU; see there for the arguments."""
    batch, groups, shared, keys, width = state.shape
    columns = min(COLUMNS, width)

    def of_group(b: Any, h: Any, n: Any) -> Any:
        return b, jax.lax.div(h, jnp.int32(shared)), 0

    def head(*shape: int) -> Any:
        return pl.BlockSpec((None, None, *shape), lambda b, h, n: (b, h, *(0,) * (len(shape) - 1), n))

    rows = pl.BlockSpec((None, None, keys), lambda b, h, n: (b, h, 0))
    pair = pl.BlockSpec((None, None, keys), of_group)
    single = pl.BlockSpec((None, 1), lambda b, h, n: (b, h))
    heads = batch, groups * shared
    held = state.reshape(*heads, keys, width)
    out, new = pl.pallas_call(
        _kernel,
        grid=(*heads, width // columns),
        in_specs=[pair, pair, rows, single, head(columns), head(keys, columns)],
        out_specs=[head(columns), head(keys, columns)],
        out_shape=[jax.ShapeDtypeStruct((*heads, width), jnp.float32), jax.ShapeDtypeStruct(held.shape, jnp.float32)],
        input_output_aliases={5: 1},
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="delta_update",
    )(q, k, decay.reshape(*heads, keys), beta.reshape(heads), v.reshape(*heads, width), held)
    return out.reshape(v.shape), new.reshape(state.shape)


def _kernel(q: Any, k: Any, decay: Any, beta: Any, values: Any, state: Any, out: Any, new: Any) -> None:
    key = k[...][:, None]
    held = decay[...][:, None] * state[...]
    value = beta[0] * (values[...] - jnp.sum(held * key, axis=0))
    held = held + key * value[None]
    new[...] = held
    out[...] = jnp.sum(held * q[...][:, None], axis=0)
