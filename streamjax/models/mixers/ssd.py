"""Mamba-2 (2405.21060) as a token mixer: the state space duality."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.recurrent import recurrence
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import SSDConfig
from streamjax.models.mixers.recurrent import RecurrentMixer, initial_rates
from streamjax.models.mixers.short_conv import ShortConv

COPYING_RATES = 1e-4, 1e-2  # of decay a token, between which the heads of a layer that begins by copying lie
COPYING_NOISE = 0.3  # how much of a drawn convolution such a layer has beside its taps


class SSD(RecurrentMixer):
    """A short convolution of inputs, B and C; a decaying sum of inputs times B, read by C; a gated norm.

    Of a group `inside` makes the heads' inputs, B and C, the heads' gates and their steps, in this order.
    """

    config: SSDConfig

    def __init__(self, config: SSDConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        key, key_conv, key_rate = jax.random.split(key, 3)
        super().__init__(config, d_model, config.head_dim, key, dtype, gain, config.bias)
        groups, channels = config.conv_shape[1:]
        self.conv = ShortConv(config.conv_width, groups, channels, key_conv, dtype, config.conv_bias)
        self.rate_log, self.step_bias = initial_rates(key_rate, config.num_heads, dtype)
        self.skip = nnx.Param(jnp.ones((config.num_heads,), dtype), axes=("heads",))
        shape = groups, config.group_size * config.head_dim
        weight = config.norm is not None and config.norm.weight
        self.norm = nnx.Param(jnp.ones(shape, dtype), axes=("kv_heads", "head_dim")) if weight else None
        if config.copies:
            self._begin_copying()

    def _begin_copying(self) -> None:
        """Steps of about one, slow decays, C as B; taps that hand a token on to inputs and C, the one before to B."""
        c, inside, taps = self.config, self.inside[...], self.conv.weight[...]
        inputs, keys, _, _ = c.group_channels
        b, read = slice(inputs, inputs + c.state_dim), slice(inputs + c.state_dim, inputs + keys)
        self.inside[...] = inside.at[..., read].set(inside[..., b])
        taps = (taps * COPYING_NOISE).at[-1].add(1.0).at[-1, :, b].add(-1.0).at[-2, :, b].add(1.0)
        self.conv.weight[...] = taps
        rates = jnp.geomspace(*COPYING_RATES, c.num_heads, dtype=jnp.float32)
        self.rate_log[...] = jnp.log(rates).astype(self.rate_log[...].dtype)
        self.step_bias[...] = jnp.full_like(self.step_bias[...], np.log(np.expm1(1.0)))

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], RecurrentState]:
        c, wide = self.config, accumulator(x.dtype)
        inputs, keys, gates, _ = c.group_channels
        projected = self._scaled(self.enter(x))
        assert state.memory is not None
        assert state.conv is not None
        mixed, conv = self.conv(projected[..., : inputs + keys], state.conv, valid, resets)
        mixed = jax.nn.silu(mixed).astype(wide)
        v = rearrange(mixed[..., :inputs], "b t g (r v) -> b t g r v", r=c.group_size)
        b, read = jnp.split(mixed[..., inputs:], 2, axis=-1)
        gate = projected[..., inputs + keys : inputs + keys + gates]
        rate, bias, skip = (
            x[...].astype(wide).reshape(c.num_groups, -1) for x in (self.rate_log, self.step_bias, self.skip)
        )
        step = jax.nn.softplus(projected[..., inputs + keys + gates :].astype(wide) + bias)
        step = jnp.clip(step, c.step_min, c.step_max)
        heads, memory = recurrence(
            read,
            b,
            v * step[..., None],
            -jnp.exp(rate) * step,
            state.memory,
            valid=valid,
            resets=resets,
            products=x.dtype,
        )
        heads = heads + skip[..., None] * v
        own = rearrange(heads, "b t g r v -> b t (g r v)").astype(x.dtype)
        heads = self._gated(rearrange(heads, "b t g r v -> b t g (r v)"), gate.astype(wide))
        heads = rearrange(heads, "b t g (r v) -> b t g r v", r=c.group_size)
        y = self.leave(heads, x.dtype)
        y = y if c.out_scale == 1.0 else y * c.out_scale
        return jnp.concatenate((y, own), axis=-1) if c.hands_on else y, RecurrentState(memory, conv)

    def _scaled(self, projected: Float[Array, "B T G D"]) -> Float[Array, "B T G D"]:
        """What the input becomes, each part times its factor."""
        c = self.config
        if not c.scales:
            return projected
        inputs, both, gates, steps = c.group_channels
        widths = inputs, both // 2, both // 2, gates, steps
        factors = [np.full(width, scale) for width, scale in zip(widths, c.scales, strict=True)]
        return projected * jnp.asarray(np.concatenate(factors), projected.dtype)

    def _gated(self, y: Float[Array, "B T G D"], gate: Float[Array, "B T G D"]) -> Float[Array, "B T G D"]:
        """The heads' outputs with their norm and their gates."""
        c, gate = self.config, jax.nn.silu(gate)
        if c.norm is None:
            return y * gate
        y = y if c.norm_before_gate else y * gate
        over = (-2, -1) if c.norm_groups == 1 else -1
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=over, keepdims=True) + c.norm.eps)
        y = y if self.norm is None else y * self.norm[...].astype(y.dtype)
        return y * gate if c.norm_before_gate else y
