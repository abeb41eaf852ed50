"""Gated linear attention (2312.06635) as a token mixer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.recurrent import recurrence
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import GatedLinearConfig
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.models.norms import Norm
from streamjax.models.parameters import kernel, product, zeros


class GatedLinear(RecurrentMixer):
    """A decaying sum of keys times values, read by queries; a gated norm of what heads read.

    Of a group `inside` makes a query, a key, a value and its gate, in this order; decays are made of `down`.
    """

    config: GatedLinearConfig

    def __init__(self, config: GatedLinearConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        key, key_down, key_up = jax.random.split(key, 3)
        super().__init__(config, d_model, config.value_dim, key, dtype, gain, bias=False)
        made, shape = ("kv_heads", "head_dim"), (config.num_groups, config.key_dim)
        self.down = kernel(key_down, (d_model, config.rank), ("embed", "latent"), d_model, dtype)
        self.up = kernel(key_up, (config.rank, *shape), ("latent", *made), config.rank, dtype)
        self.up_bias = zeros(shape, made, dtype)
        self.norm = Norm(config.value_dim, config.norm, dtype, "head_dim")

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        c, wide = self.config, accumulator(x.dtype)
        assert state.memory is not None
        ends = c.key_dim, 2 * c.key_dim, 2 * c.key_dim + c.value_dim
        q, k, v, gate = jnp.split(self.enter(x), ends, axis=-1)
        low = product("bte,er->btr", x, self.down[...])
        raw = product("btr,rgk->btgk", low, self.up[...], wide) + self.up_bias[...].astype(wide)
        decay = jax.nn.log_sigmoid(raw) / c.decay_power
        heads, memory = recurrence(
            q.astype(wide) * c.key_dim**-0.5,
            k,
            v[..., None, :],
            decay[..., None, :],
            state.memory,
            valid=valid,
            resets=resets,
            products=x.dtype,
        )
        heads = self.norm(heads) * jax.nn.silu(gate.astype(wide))[..., None, :]
        return self.leave(heads, x.dtype), RecurrentState(memory)
