"""Partials of the same queries on the devices of the mesh axis `context`, merged."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.partial import Partial
from streamjax.attention.context.exchange import AXIS


def merge_over_devices(part: Partial) -> Partial:
    """`pallas_kernels.partial.merge` of what the devices have: a maximum and a sum, as large as queries."""
    top = jax.lax.pmax(jax.lax.stop_gradient(part.lse), AXIS)
    top = jnp.where(jnp.isneginf(top), 0.0, top)  # it cancels out
    weights = jnp.exp(part.lse - top)[..., None]
    sums = jax.lax.psum(jnp.concatenate((part.out * weights, weights), axis=-1), AXIS)
    total = sums[..., -1]
    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    return Partial(sums[..., :-1] / divisor[..., None], jnp.where(some, top + jnp.log(divisor), -jnp.inf))
