"""Recurrences over matrix states: see `pallas_kernels.api`."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from pallas_kernels import argument_checks, reference
from pallas_kernels.api.platforms import Implementation, find
from pallas_kernels.flash_call import no_gradient
from pallas_kernels.gpu.recurrence import chunkwise as gpu_chunkwise
from pallas_kernels.gpu.recurrence import delta_update as gpu_update
from pallas_kernels.recurrence_block import COARSE, Operands
from pallas_kernels.recurrence_products import Products
from pallas_kernels.tpu.recurrence import chunkwise as tpu_chunkwise
from pallas_kernels.tpu.recurrence import delta_update as tpu_update

_UPDATES = {"tpu": tpu_update.delta_update, "triton": gpu_update.delta_update}
_CHUNKWISE = {"tpu": tpu_chunkwise, "triton": gpu_chunkwise}


def delta_update(
    q: Float[Array, "B G K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B G R V"],
    decay: Float[Array, "B G R K"],
    beta: Float[Array, "B G R"],
    state: Float[Array, "B G R K V"],
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B G R V"], Float[Array, "B G R K V"]]:
    """One token of the delta rule: what it reads, and its states, each read once and written once, in its place.

    A state S becomes `S' + k (beta (v - S'^T k))^T` with `S' = decay S`, and `S^T q` of the new one is the output. Its
    derivative is that of the plain formula.

    Args:
      q, k: query and key of each of G groups of heads.
      v: values; R heads share the query and the key of a group.
      decay: of each row of a state.
      beta: how much of its value each head writes.
      state: in front of the token. All arguments are float32.
      implementation: "tpu" or "triton"; the platform's where None.
      interpret: run it in an interpreter, on any platform.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    argument_checks.delta_update(q, k, v, decay, beta, state)
    find(_UPDATES, "kernel of the delta rule", implementation)
    return _update(implementation, interpret, q, k, v, decay, beta, state)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _update(implementation: Implementation | None, interpret: Any, *arrays: Array) -> tuple[Array, Array]:
    run = find(_UPDATES, "kernel of the delta rule", implementation)
    found: tuple[Array, Array] = run(*arrays, interpret=interpret)
    return found


@_update.defjvp
def _derivative(implementation: Any, interpret: Any, arrays: Any, tangents: Any) -> Any:
    return jax.jvp(reference.delta_update, arrays, tangents)


def chunkwise_recurrence(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G R V"],
    log_decay: Float[Array, "B T G R"] | Float[Array, "B T G R K"],
    state: Float[Array, "B G R K V"],
    *,
    beta: Float[Array, "B T G R"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    block: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T G R V"], Float[Array, "B G R K V"]]:
    """T tokens of a recurrence over matrix states, a block of tokens at a time: what each reads, and the states behind.

    A token makes of a state S first `S' = decay S`, then `S' + k v^T`, or with `beta` (the delta rule)
    `S' + k (beta (v - S'^T k))^T`, and reads `S^T q` of it: Mamba-2 and gated linear attention, Gated DeltaNet and KDA.
    For gradients the states between blocks are kept, and nothing else but the arguments.

    Args:
      q, k: queries and keys of G groups of heads; bfloat16 or float32.
      v: values of the same dtype; R heads share the queries and the keys of a group.
      log_decay: logarithm of a token's decay, at most 0, of a head or of each channel of its key; float32.
      state: in front of the tokens, float32.
      beta: how much of its value a token writes, float32; None: all of it, and the rule only adds.
      resets: the tokens that begin with an empty state.
      block: tokens of a block, a power of two; the platform's where None.
      implementation: "tpu" or "triton"; the platform's where None.
      interpret: run it in an interpreter, on any platform.

    Returns:
      Outputs in the dtype of v, and states, float32. Products take operands of that dtype: a bfloat16 state is never
      kept, but what is read of a state is read of it rounded to bfloat16.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no kernel for the platform.
    """
    argument_checks.chunkwise(q, k, v, log_decay, beta, state, resets, block)
    platform = find(_CHUNKWISE, "kernel of recurrences", implementation)
    channels, length = log_decay.ndim == 5, q.shape[1]
    size = block or platform.block_size(channels, length)

    def cut(x: Array | None, pattern: str = "b t ... -> b t ...") -> Any:
        if x is None:
            return None
        padded = jnp.pad(x, ((0, 0), (0, -length % size), *((0, 0),) * (x.ndim - 2)))
        return rearrange(padded, pattern, **({"c": size} if " c" in pattern else {}))

    heads = "b (n c) g r -> b n g r c"
    decay, coarse = cut(log_decay, "b t ... -> b t ..." if channels else heads), None
    if not channels:
        steps = jax.lax.stop_gradient(jnp.round(decay / COARSE) * COARSE)
        decay, coarse = (jnp.cumsum(x, axis=-1) for x in (decay - steps, steps))
    segments = None if resets is None else jnp.cumsum(cut(resets, "b (n c) -> b n c"), axis=-1, dtype=jnp.int32)
    given = Operands(cut(q), cut(k), cut(v), decay, coarse, cut(beta, heads), segments, jnp.swapaxes(state, -1, -2))
    out, new = _read(_Call(implementation, size, interpret), given)
    return out[:, :length], jnp.swapaxes(new, -1, -2)


class _Call(NamedTuple):
    implementation: Implementation | None
    size: int
    interpret: Any

    def platform(self) -> Any:
        return find(_CHUNKWISE, "kernel of recurrences", self.implementation)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(call: _Call, given: Operands) -> tuple[Array, Array]:
    out, state, _ = call.platform().forward(given, call.size, Products(given.v.dtype), False, call.interpret)
    return out, state


def _read_forward(call: _Call, given: Operands) -> tuple[tuple[Array, Array], tuple[Operands, Array]]:
    out, state, kept = call.platform().forward(given, call.size, Products(given.v.dtype), True, call.interpret)
    return (out, state), (given, kept)


def _read_backward(call: _Call, saved: tuple[Operands, Array], cotangents: tuple[Array, Array]) -> tuple[Operands]:
    given, kept = saved
    products = Products(given.v.dtype)
    made = call.platform().backward(given, kept, call.size, products, *cotangents, interpret=call.interpret)
    constant = {name: no_gradient(getattr(given, name)) for name in ("coarse", "segments")}
    found = {name: x if x is None else x.astype(getattr(given, name).dtype) for name, x in made._asdict().items()}
    return (Operands(**{**found, **constant}),)


_read.defvjp(_read_forward, _read_backward)
