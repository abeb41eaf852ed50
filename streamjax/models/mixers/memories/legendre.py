"""The Legendre memory unit (Voelker et al., 2019) in its parallel form (2102.11417) as a token mixer.

`u = relu(W_u x + b_u)`, a memory of each channel of u, `y = relu(W_m m + W_x x + b_y)`. It is LMUFormer's block
(2402.04882) with an MLP behind it, without that model's embedding of patches and without spikes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from streamjax.attention.legendre_memory import legendre_memory
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import LMUConfig
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.models.parameters import kernel, product


class LMU(RecurrentMixer):
    """Of a group `inside` makes what is remembered; `out` reads all numbers of its memories, polynomials outside."""

    config: LMUConfig

    def __init__(self, config: LMUConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        key, key_direct = jax.random.split(key)
        super().__init__(config, d_model, config.order * config.channels, key, dtype, gain, bias=True)
        self.direct = kernel(key_direct, (d_model, d_model), ("embed", "activation_embed"), d_model, dtype, gain)

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        assert state.memory is not None
        remembered = jax.nn.relu(self.enter(x))
        memories, last = legendre_memory(remembered, state.memory, theta=self.config.theta, valid=valid, resets=resets)
        heads = rearrange(memories, "b t g n d -> b t g 1 (n d)")
        y = self.leave(heads, x.dtype) + product("bte,ef->btf", x, self.direct[...])
        return jax.nn.relu(y), RecurrentState(last)
