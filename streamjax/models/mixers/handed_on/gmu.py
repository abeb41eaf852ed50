"""The gated memory unit (SambaY, 2507.06607) as a token mixer: gates on what the heads of a layer below have read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import GMUConfig
from streamjax.models.mixers.recurrent import RecurrentMixer


class GMU(RecurrentMixer):
    """`out(silu(inside(x)) * m)` of each token: `m` stands behind its input, as a layer below handed it on."""

    config: GMUConfig

    def __init__(self, config: GMUConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        super().__init__(config, d_model, config.channels, key, dtype, gain, bias=False)

    def recur(
        self,
        x: Float[Array, "B T W"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        x, memory = x[..., : -self.config.received], x[..., -self.config.received :]
        gated = jax.nn.silu(self.enter(x)) * rearrange(memory, "b t (g c) -> b t g c", g=self.config.num_groups)
        return self.leave(gated[:, :, :, None], x.dtype), state
