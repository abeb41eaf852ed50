"""RWKV-7's channel mixing (2503.14456) as a token mixer: an MLP that reads a mix of the token and the one before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import ChannelMixConfig
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.models.mixers.short_conv import one_before


class ChannelMix(RecurrentMixer):
    """`out(relu(inside(x + (before - x) * mix))^2)`, without a gate; the state is the newest token's input."""

    config: ChannelMixConfig

    def __init__(self, config: ChannelMixConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        if config.num_groups * config.width != d_model:
            raise ValueError(
                f"ChannelMixConfig has {config.num_groups} parts of {config.width}: together they must be d_model, "
                f"{d_model}"
            )
        super().__init__(config, d_model, config.channels, key, dtype, gain, bias=False)
        self.shift = nnx.Param(jnp.full((d_model,), 0.5, dtype), axes=("embed",))

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        assert state.conv is not None
        parts = rearrange(x, "b t (g d) -> b t g d", g=self.config.num_groups)
        earlier, newest = one_before(parts, state.conv, valid, resets)
        mixed = x + (rearrange(earlier, "b t g d -> b t (g d)") - x) * self.shift[...].astype(x.dtype)
        hidden = jnp.square(jax.nn.relu(self.enter(mixed)))
        return self.leave(hidden[:, :, :, None], x.dtype), RecurrentState(None, newest)
