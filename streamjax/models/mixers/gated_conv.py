"""A short convolution between two gates as a token mixer, as LFM2 (2511.23404) has it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import GatedConvConfig
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.models.mixers.short_conv import ShortConv


class GatedConv(RecurrentMixer):
    """`out * conv(in * x)`: of a group `inside` makes both gates and what they gate, in this order.

    No activation, and no state but what the convolution still reads.
    """

    config: GatedConvConfig

    def __init__(self, config: GatedConvConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        key, key_conv = jax.random.split(key)
        super().__init__(config, d_model, config.channels, key, dtype, gain, config.bias)
        self.conv = ShortConv(config.conv_width, config.num_groups, config.channels, key_conv, dtype, config.bias)

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        into, out, values = jnp.split(self.enter(x), 3, axis=-1)
        assert state.conv is not None
        mixed, conv = self.conv(into * values, state.conv, valid, resets)
        return self.leave((out * mixed)[:, :, :, None], x.dtype), RecurrentState(None, conv)
