"""Recurrences over a sequence that lies on several devices: each learns the state that its stretch begins with.

A stretch turns the state in front of it into `A S + B`: B is the state that it leaves behind an empty one; A is its
decay, or with a delta rule, where each key erases, the matrix that it makes of the identity. Devices exchange these, in
size a state or two, and each applies those of the stretches before its own. Then it reads its stretch as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from streamjax.attention.context.exchange import AXIS, place
from streamjax.attention.sharded import Names, per_device_call

Recurrence = Callable[..., tuple[Array, Array]]
_TOKEN: Names = ("batch", "length", "kv_heads", None)
_STATE: Names = ("batch", "heads", None, None)


def context_recurrence(
    local: Recurrence,
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G R V"],
    log_decay: Float[Array, "B T G R"] | Float[Array, "B T G R K"],
    state: Float[Array, "B H K V"],
    beta: Float[Array, "B T G R"] | None,
    resets: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T G R V"], Float[Array, "B H K V"]]:
    """`attention.recurrent.recurrence`, which is `local`, where the mesh axis `context` splits the tokens."""

    def own(q: Array, k: Array, v: Array, decay: Array, state: Array, beta: Any, resets: Any) -> tuple[Array, Array]:
        known = {"beta": beta, "resets": resets}
        if beta is None:
            added = local(q, k, v, decay, jnp.zeros_like(state), **known)[1]
            kept = _decay(decay, resets, state)
        else:
            width, size = state.shape[-2:]
            identity = jnp.broadcast_to(jnp.eye(width, dtype=state.dtype), (*state.shape[:-1], width))
            wider = jnp.concatenate((v, jnp.zeros((*v.shape[:-1], width), v.dtype)), axis=-1)
            start = jnp.concatenate((jnp.zeros_like(state), identity), axis=-1)
            made = local(q, k, wider, decay, start, **known)[1]
            added, kept = made[..., :size], made[..., size:]

        def through(state: Array, stretch: tuple[Array, Array]) -> tuple[Array, Array]:
            kept, added = stretch
            return added + (kept * state if beta is None else kept @ state), state

        behind, fronts = jax.lax.scan(through, state, jax.lax.all_gather((kept, added), AXIS))
        return local(q, k, v, decay, fronts[place()[0]], **known)[0], behind

    names = (_TOKEN, _TOKEN, (*_TOKEN, None), (*_TOKEN, None)[: log_decay.ndim], _STATE, _TOKEN, _TOKEN[:2])
    arrays = (q, k, v, log_decay, state, beta, resets)
    return per_device_call(own, names, ((*_TOKEN, None), _STATE), arrays)


def context_elementwise(
    local: Recurrence,
    x: Float[Array, "B T G D"],
    log_decay: Float[Array, "B T G D"],
    state: Float[Array, "B G D"],
    resets: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T G D"], Float[Array, "B G D"]]:
    """`attention.elementwise_recurrence.elementwise_recurrence`, which is `local`, in the same way."""

    def own(x: Array, decay: Array, state: Array, resets: Any) -> tuple[Array, Array]:
        added = local(x, decay, jnp.zeros_like(state), resets=resets)[1]
        kept = jnp.exp(jnp.sum(decay.astype(state.dtype), axis=1))
        kept = kept if resets is None else jnp.where(jnp.any(resets, axis=1)[:, None, None], 0.0, kept)

        def through(state: Array, stretch: tuple[Array, Array]) -> tuple[Array, Array]:
            return stretch[0] * state + stretch[1], state

        behind, fronts = jax.lax.scan(through, state, jax.lax.all_gather((kept, added), AXIS))
        return local(x, decay, fronts[place()[0]], resets=resets)[0], behind

    few: Names = ("batch", "kv_heads", None)
    return per_device_call(own, (_TOKEN, _TOKEN, few, _TOKEN[:2]), (_TOKEN, few), (x, log_decay, state, resets))


def _decay(log_decay: Array, resets: Any, state: Float[Array, "B H K V"]) -> Float[Array, "B H D 1"]:
    """What is left of a state behind the stretch, for a head or for each channel of its key."""
    total = jnp.sum(log_decay.astype(state.dtype), axis=1)  # [B, G, R] or [B, G, R, K]
    kept = jnp.exp(total).reshape(*state.shape[:2], -1, 1)
    return kept if resets is None else jnp.where(jnp.any(resets, axis=1)[:, None, None, None], 0.0, kept)
