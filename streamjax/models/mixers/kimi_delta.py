"""Kimi Delta Attention (2510.26692) as a token mixer: the delta rule with a decay for each channel of a key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.recurrent import recurrence
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import KimiDeltaConfig
from streamjax.models.mixers.gated_delta import unit
from streamjax.models.mixers.recurrent import RecurrentMixer, initial_rates
from streamjax.models.mixers.short_conv import ShortConv
from streamjax.models.norms import Norm
from streamjax.models.parameters import kernel, product


class KimiDelta(RecurrentMixer):
    """A short convolution of queries, keys and values; the delta rule; a norm of what heads read, gated by a sigmoid.

    Of a group `inside` makes a query, a key, a value, and how much of its value a token writes, in this order. Steps
    and gates are made of `down`, a few channels each: those of the steps first.
    """

    config: KimiDeltaConfig

    def __init__(self, config: KimiDeltaConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        key, key_conv, key_rate, key_down, key_step, key_gate = jax.random.split(key, 6)
        super().__init__(config, d_model, config.value_dim, key, dtype, gain, bias=False)
        groups, rank = config.num_groups, config.rank
        made = ("latent", "kv_heads", "head_dim")
        self.conv = ShortConv(config.conv_width, groups, config.conv_shape[-1], key_conv, dtype)
        self.down = kernel(key_down, (d_model, 2, rank), ("embed", "gates", "latent"), d_model, dtype)
        self.step_up = kernel(key_step, (rank, groups, config.key_dim), made, rank, dtype)
        self.gate_up = kernel(key_gate, (rank, groups, config.value_dim), made, rank, dtype)
        self.rate_log, bias = initial_rates(key_rate, config.num_heads, dtype)
        self.step_bias = nnx.Param(jnp.tile(bias[...][:, None], (1, config.key_dim)), axes=made[1:])
        self.norm = Norm(config.value_dim, config.norm, dtype, "head_dim")

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        c, wide = self.config, accumulator(x.dtype)
        inside = self.enter(x)
        assert state.memory is not None
        assert state.conv is not None
        mixed, conv = self.conv(inside[..., :-1], state.conv, valid, resets)
        q, k, v = jnp.split(jax.nn.silu(mixed), (c.key_dim, 2 * c.key_dim), axis=-1)
        low = product("bte,egr->btgr", x, self.down[...])
        step = product("btr,rgk->btgk", low[..., 0, :], self.step_up[...]).astype(wide)
        gate = product("btr,rgv->btgv", low[..., 1, :], self.gate_up[...]).astype(wide)
        rate, bias = (part[...].astype(wide) for part in (self.rate_log, self.step_bias))
        decay = -jnp.exp(rate)[:, None] * jax.nn.softplus(step + bias)
        heads, memory = recurrence(
            unit(q.astype(wide)) * c.key_dim**-0.5,
            unit(k.astype(wide)),
            v[..., None, :],
            decay[..., None, :],
            state.memory,
            beta=jax.nn.sigmoid(inside[..., -1:].astype(wide)),
            valid=valid,
            resets=resets,
            products=x.dtype,
        )
        heads = self.norm(heads) * jax.nn.sigmoid(gate)[..., None, :]
        return self.leave(heads, x.dtype), RecurrentState(memory, conv)
