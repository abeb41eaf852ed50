"""Leaky neurons that spike, token by token: SpikingJelly's `LIFNode`, as LMUFormer has it (2402.04882, section 3.2).

A potential v moves towards its input, `v' = v + (x - v) / tau`. At the threshold the neuron fires: it gives 1 in place
of 0, and begins again at 0. The derivative of firing is that of a sigmoid of slope 4; none goes through the reset.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator

TAU = 2.0  # tokens
SLOPE = 4.0  # of the sigmoid whose derivative firing has


@jax.custom_jvp
def fire(above: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """1 where a potential is at its threshold or above, else 0; `above` is by how much."""
    return (above >= 0).astype(above.dtype)


@fire.defjvp
def _fire_derivative(primals: Any, tangents: Any) -> Any:
    (above,), (tangent,) = primals, tangents
    smooth = jax.nn.sigmoid(SLOPE * above)
    return fire(above), SLOPE * smooth * (1 - smooth) * tangent


def leaky_spikes(
    x: Float[Array, "B T ..."],
    state: Float[Array, "B ..."],
    *,
    threshold: float = 1.0,
    valid: Bool[Array, "B T"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B ..."]]:
    """Read T tokens: the spikes of each, and the potentials behind the last.

    Args:
      x: inputs, a neuron a channel.
      state: potentials in front of the tokens, in the dtype of sums (float32; float64 for float64).
      threshold: at which a neuron fires.
      valid: the tokens that count, the first ones of each row; the others change no potential. All where None.
      resets: the tokens in front of which potentials are 0.

    Returns:
      Spikes in the dtype of sums, 0 or 1, and the new potentials. A row without valid tokens keeps them bit for bit.

    Example: inputs of 1.5, 1.5, 1.5 charge a neuron to 0.75, 1.125 and, from 0 again, 0.75: its spikes are 0, 1, 0.
    """
    dtype, beside = accumulator(x.dtype), (slice(None), *(None,) * (x.ndim - 2))

    def step(potential: Array, token: tuple[Array, Array | None, Array | None]) -> tuple[Array, Array]:
        given, counts, reset = token
        before = potential if reset is None else jnp.where(reset[beside], 0.0, potential)
        charged = before + (given - before) / TAU
        spikes = fire(charged - threshold)
        new = charged * (1 - jax.lax.stop_gradient(spikes))
        return new if counts is None else jnp.where(counts[beside], new, potential), spikes

    masks = [None if mask is None else mask.T for mask in (valid, resets)]
    state, spikes = jax.lax.scan(step, state, (jnp.moveaxis(x.astype(dtype), 1, 0), masks[0], masks[1]))
    return jnp.moveaxis(spikes, 0, 1), state
