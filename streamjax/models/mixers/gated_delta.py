"""Gated DeltaNet (2412.06464) as a token mixer, as Qwen3-Next has it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.recurrent import recurrence
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import GatedDeltaConfig
from streamjax.models.mixers.recurrent import RecurrentMixer, initial_rates
from streamjax.models.mixers.short_conv import ShortConv
from streamjax.models.norms import Norm

NORM_EPS = 1e-6  # under the lengths of queries and keys


class GatedDelta(RecurrentMixer):
    """A short convolution of queries, keys and values; the delta rule with a decay; a gated norm of what heads read.

    Of a group `inside` makes a query, a key, the heads' values and gates, how much of its value each head writes, and
    its step, in this order.
    """

    config: GatedDeltaConfig

    def __init__(self, config: GatedDeltaConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        key, key_conv, key_rate = jax.random.split(key, 3)
        super().__init__(config, d_model, config.value_dim, key, dtype, gain, bias=False)
        self.conv = ShortConv(config.conv_width, config.num_groups, config.conv_shape[-1], key_conv, dtype)
        self.rate_log, self.step_bias = initial_rates(key_rate, config.num_heads, dtype)
        self.norm = Norm(config.value_dim, config.norm, dtype, "head_dim")

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        c, wide = self.config, accumulator(x.dtype)
        keys, values, gates, _ = c.group_channels
        inside = self.enter(x)
        assert state.memory is not None
        assert state.conv is not None
        mixed, conv = self.conv(inside[..., : keys + values], state.conv, valid, resets)
        mixed = jax.nn.silu(mixed)
        q, k = (unit(part.astype(wide)) for part in jnp.split(mixed[..., :keys], 2, axis=-1))
        v, gate = (
            rearrange(part, "b t g (r v) -> b t g r v", r=c.group_size)
            for part in (mixed[..., keys:], inside[..., keys + values : keys + values + gates])
        )
        write, step = jnp.split(inside[..., keys + values + gates :].astype(wide), 2, axis=-1)
        beta = jax.nn.sigmoid(write) * (2.0 if c.negative_eigenvalues else 1.0)
        rate, bias = (x[...].astype(wide).reshape(c.num_groups, -1) for x in (self.rate_log, self.step_bias))
        heads, memory = recurrence(
            q * c.key_dim**-0.5,
            k,
            v,
            -jnp.exp(rate) * jax.nn.softplus(step + bias),
            state.memory,
            beta=beta,
            valid=valid,
            resets=resets,
            products=x.dtype,
        )
        heads = self.norm(heads) * jax.nn.silu(gate.astype(wide))
        return self.leave(heads, x.dtype), RecurrentState(memory, conv)


def unit(x: Float[Array, "B T G K"]) -> Float[Array, "B T G K"]:
    """Vectors of length 1."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)
