"""Recurrences over matrix states: see `pallas_kernels.api`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels import argument_checks, reference
from pallas_kernels.api.platforms import Implementation, find
from pallas_kernels.gpu.recurrence import delta_update as gpu_update
from pallas_kernels.tpu.recurrence import delta_update as tpu_update

_UPDATES = {"tpu": tpu_update.delta_update, "triton": gpu_update.delta_update}


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
