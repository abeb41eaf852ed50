"""HGRN (2311.04823) and HGRN2 (2404.07904) as token mixers: what a channel forgets is what it writes.

The least decay of a layer is a number of its config, or learned as in the papers: for each channel, by a cumulative
softmax over the layers (`handed_on/learned_bounds.py`). `rising_bounds` gives the values that this starts from.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.elementwise_recurrence import elementwise_recurrence
from streamjax.attention.recurrent import recurrence
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import HGRN2Config, HGRNConfig
from streamjax.models.mixers.recurrent import RecurrentMixer


class HGRN(RecurrentMixer):
    """Single channels; of a group `inside` makes inputs, what decays are made of, and output gates, in this order."""

    config: HGRNConfig

    def __init__(self, config: HGRNConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        super().__init__(config, d_model, config.channels, key, dtype, gain, bias=False)
        self.norm = _norm_weight(config.num_groups, config.channels, dtype)
        self.bound: nnx.Variable | None = nnx.data(None)  # see `with_bounds`

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        c, wide = self.config, accumulator(x.dtype)
        assert state.memory is not None
        values, raw, gate = (part.astype(wide) for part in jnp.split(self.enter(x), 3, axis=-1))
        decay = _bounded(raw, self)
        added = jax.nn.silu(values) * -jnp.expm1(decay)
        heads, memory = elementwise_recurrence(added, decay, state.memory[:, :, 0], valid=valid, resets=resets)
        heads = _normed(heads, self.norm, c.norm.eps) * jax.nn.silu(gate)
        return self.leave(heads[..., None, :], x.dtype), RecurrentState(memory[:, :, None])


class HGRN2(RecurrentMixer):
    """Matrix states; of a group `inside` makes the query, what decays are made of, and the value, in this order."""

    config: HGRN2Config

    def __init__(self, config: HGRN2Config, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        super().__init__(config, d_model, config.value_dim, key, dtype, gain, bias=False)
        self.norm = _norm_weight(config.num_groups, config.value_dim, dtype)
        self.bound: nnx.Variable | None = nnx.data(None)  # see `with_bounds`

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        c, wide = self.config, accumulator(x.dtype)
        assert state.memory is not None
        q, raw, v = jnp.split(self.enter(x), (c.key_dim, 2 * c.key_dim), axis=-1)
        decay = _bounded(raw.astype(wide), self)
        heads, memory = recurrence(
            jax.nn.silu(q.astype(wide)) * c.key_dim**-0.5,
            -jnp.expm1(decay),
            v[..., None, :],
            decay[..., None, :],
            state.memory,
            valid=valid,
            resets=resets,
            products=x.dtype,
        )
        heads = _normed(heads[..., 0, :], self.norm, c.norm.eps)
        return self.leave(heads[..., None, :], x.dtype), RecurrentState(memory)


def rising_bounds(num_layers: int) -> tuple[float, ...]:
    """The least decay of each layer: 0 in the first one, and from layer to layer the same step towards 1."""
    return tuple(layer / num_layers for layer in range(num_layers))


def _bounded(raw: Float[Array, "B T G D"], mixer: HGRN | HGRN2) -> Float[Array, "B T G D"]:
    """Logarithms of decays between the layer's least ones and 1."""
    decay, least = jax.nn.log_sigmoid(raw), mixer.config.lower_bound
    if least == "learned":
        if mixer.bound is None:
            raise ValueError('a layer with lower_bound "learned" is read by itself: take it from with_bounds(model)')
        bound, rest = mixer.bound[...].astype(raw.dtype)
        return jnp.logaddexp(bound, rest + decay)
    return decay if least == 0 else jnp.logaddexp(math.log(least), math.log1p(-least) + decay)


def _norm_weight(groups: int, width: int, dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param(jnp.ones((groups, width), dtype), axes=("kv_heads", "head_dim"))


def _normed(x: Float[Array, "B T G D"], weight: nnx.Param, eps: float) -> Float[Array, "B T G D"]:
    """Normed over the channels of all groups."""
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=(-2, -1), keepdims=True) + eps)
    return x * weight[...].astype(x.dtype)
