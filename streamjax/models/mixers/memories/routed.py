"""Mixture of memories (2502.13685) as a token mixer: Gated DeltaNet with several states, of which a token writes few.

What a memory holds is not disturbed by tokens that are routed elsewhere. All memories are computed, and those that a
token is not routed to keep their states: their decay is 1 and nothing is written. The paper's loss that balances
memories is not here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.recurrent import recurrence
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import MoMConfig
from streamjax.models.mixers.gated_delta import unit
from streamjax.models.mixers.recurrent import RecurrentMixer, initial_rates
from streamjax.models.mixers.short_conv import ShortConv
from streamjax.models.norms import Norm
from streamjax.models.parameters import kernel, product


class MixtureOfMemories(RecurrentMixer):
    """Of a group `inside` makes a query, keys and values of all memories, a gate, and of all memories how much is
    written and their steps, in this order; the shared memory is the last of each."""

    config: MoMConfig

    def __init__(self, config: MoMConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        key, key_conv, key_rate, key_router = jax.random.split(key, 4)
        super().__init__(config, d_model, config.value_dim, key, dtype, gain, bias=False)
        self.conv = ShortConv(config.conv_width, config.num_groups, config.conv_shape[-1], key_conv, dtype)
        self.rate_log, self.step_bias = initial_rates(key_rate, config.num_heads * config.all_memories, dtype)
        self.router = kernel(key_router, (d_model, config.memories), ("embed", "router"), d_model, dtype, inputs=())
        self.norm = Norm(config.value_dim, config.norm, dtype, "head_dim")

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        c, wide = self.config, accumulator(x.dtype)
        query, keys, values, gates, _ = c.group_channels
        inside, last = self.enter(x), query + keys + values
        assert state.memory is not None
        assert state.conv is not None
        mixed, conv = self.conv(inside[..., :last], state.conv, valid, resets)
        q, k, v = jnp.split(jax.nn.silu(mixed).astype(wide), (query, query + keys), axis=-1)
        q = repeat(unit(q) * c.key_dim**-0.5, "b t g k -> b t (g m) k", m=c.all_memories)
        k = unit(rearrange(k, "b t g (m k) -> b t (g m) k", k=c.key_dim))
        v = rearrange(v, "b t g (m v) -> b t (g m) 1 v", v=c.value_dim)
        shares = self.shares(x)
        written = jnp.tile(shares > 0, (1, 1, c.num_groups))
        write, step = jnp.split(inside[..., last + gates :].astype(wide), 2, axis=-1)
        write, step = (rearrange(part, "b t g m -> b t (g m)") for part in (write, step))
        rate, bias = (part[...].astype(wide) for part in (self.rate_log, self.step_bias))
        decay = jnp.where(written, -jnp.exp(rate) * jax.nn.softplus(step + bias), 0.0)
        beta = jnp.where(written, jax.nn.sigmoid(write), 0.0)
        heads, memory = recurrence(
            q, k, v, decay[..., None], state.memory, beta=beta[..., None], valid=valid, resets=resets
        )
        read = rearrange(heads, "b t (g m) 1 v -> b t g m v", m=c.all_memories)
        total = jnp.sum(read * shares[:, :, None, :, None], axis=3)
        total = self.norm(total) * jax.nn.silu(inside[..., last : last + gates].astype(wide))
        return self.leave(total[:, :, :, None], x.dtype), RecurrentState(memory, conv)

    def shares(self, x: Float[Array, "B T E"]) -> Float[Array, "B T M"]:
        """How much each memory counts in a token's output: 0 of those that it is not routed to, 1 of the shared one."""
        scores = jax.nn.softmax(product("bte,em->btm", x, self.router[...], accumulator(x.dtype)), axis=-1)
        _, chosen = jax.lax.top_k(scores, self.config.active)
        scores = scores * jnp.sum(jax.nn.one_hot(chosen, self.config.memories, dtype=scores.dtype), axis=-2)
        scores = scores / jnp.sum(scores, axis=-1, keepdims=True)
        return jnp.concatenate((scores, jnp.ones_like(scores[..., :1])), axis=-1)
