"""RWKV-7's time mixing (2503.14456) as a token mixer.

Every projection reads a mix of the token's input and the one before it. RWKV's
channel mixing is another mixer (`mixers/handed_on/channel_mix.py`).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.generalised_delta import generalised_delta
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import RWKV7Config
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.models.mixers.short_conv import one_before
from streamjax.models.parameters import kernel, product, zeros

SLOWEST = -math.exp(-0.5)  # the strongest logarithm of a decay
UNIT_EPS = 1e-12


class RWKV7(RecurrentMixer):
    """The generalised delta rule; a norm of what each head reads, its own token's value beside it, and a gate.

    `mix` has the share of the token before in what queries, keys, values, decays, learning rates and gates are made
    of, in this order; `down` and `up` make decays, learning rates, gates and, where it takes some, its share of the
    values that are handed on, and `bias` is that of all but the gates. `keys` has
    three weights of a key's channels: where its state is erased, how far a learning rate scales it, and what the query
    reads of the token's own value. `norm` has the weight and the bias of a head's norm.
    """

    config: RWKV7Config

    def __init__(self, config: RWKV7Config, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        heads, width, ranks = config.num_groups, config.head_dim, config.ranks
        if heads * width != d_model:
            raise ValueError(f"RWKV7Config has {heads} heads of {width}: together they must be d_model, {d_model}")
        key, key_down, key_up = jax.random.split(key, 3)
        super().__init__(config, d_model, width, key, dtype, gain, bias=False)
        made = ("kv_heads", "head_dim")
        self.mix = nnx.Param(jnp.full((6, d_model), 0.5, dtype), axes=("gates", "embed"))
        self.down = kernel(key_down, (d_model, sum(ranks)), ("embed", "latent"), d_model, dtype)
        self.up = kernel(key_up, (sum(ranks), heads, width), ("latent", *made), max(ranks), dtype, inputs=())
        self.bias = zeros((len(ranks) - 1, heads, width), ("gates", *made), dtype)
        self.keys = nnx.Param(jnp.ones((3, heads, width), dtype), axes=("gates", *made))
        norm = jnp.stack((jnp.ones((heads, width), dtype), jnp.zeros((heads, width), dtype)))
        self.norm = nnx.Param(norm, axes=("gates", *made))

    def recur(
        self,
        x: Float[Array, "B T W"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], RecurrentState]:
        c, wide = self.config, accumulator(x.dtype)
        assert state.memory is not None
        assert state.conv is not None
        x, first = (x[..., : -c.received], x[..., -c.received :]) if c.received else (x, None)
        by_head = rearrange(x, "b t (g d) -> b t g d", g=c.num_groups)
        earlier, newest = one_before(by_head, state.conv, valid, resets)
        earlier = rearrange(earlier, "b t g d -> b t (g d)")
        mixed = x[:, :, None] + (earlier - x)[:, :, None] * self.mix[...].astype(x.dtype)
        parts = [self.inside[:, :, i * c.head_dim : (i + 1) * c.head_dim] for i in range(3)]
        q, k, v = (product("bte,egk->btgk", mixed[:, :, i], part).astype(wide) for i, part in enumerate(parts))
        decays, rates, gates, *shares = self._made(mixed, wide)
        bias, weights, norm = (part[...].astype(wide) for part in (self.bias, self.keys, self.norm))
        log_decay, rate = SLOWEST * jax.nn.sigmoid(decays + bias[0]), jax.nn.sigmoid(rates + bias[1])
        own = v
        if first is not None:
            share = jax.nn.sigmoid(shares[0] + bias[2])
            v = v + (rearrange(first, "b t (g d) -> b t g d", g=c.num_groups).astype(wide) - v) * share
        along = k * weights[0]
        along = along * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(along), axis=-1, keepdims=True), UNIT_EPS))
        k = k * (1.0 + (rate - 1.0) * weights[1])
        heads, memory = generalised_delta(
            q, k, v, -along, along * rate, log_decay, state.memory, valid=valid, resets=resets
        )
        heads = heads - jnp.mean(heads, axis=-1, keepdims=True)
        heads = heads * jax.lax.rsqrt(jnp.mean(jnp.square(heads), axis=-1, keepdims=True) + c.norm_eps)
        direct = jnp.sum(q * k * weights[2], axis=-1, keepdims=True) * v
        heads = (heads * norm[0] + norm[1] + direct) * gates
        y = self.leave(heads[..., None, :], x.dtype)
        if c.handed_on:
            y = jnp.concatenate((y, rearrange(own, "b t g d -> b t (g d)").astype(y.dtype)), axis=-1)
        return y, RecurrentState(memory, newest)

    def _made(self, mixed: Float[Array, "B T 6 E"], dtype: jnp.dtype) -> list[Float[Array, "B T G K"]]:
        """What decays, learning rates, gates and shares of values are made of, through a few channels each."""
        found, start = [], 0
        bends = (jnp.tanh, None, jax.nn.sigmoid, None)
        for rank, source, bend in zip(self.config.ranks, (3, 4, 5, 2), bends, strict=False):
            low = product("bte,er->btr", mixed[:, :, source], self.down[:, start : start + rank])
            low = low if bend is None else bend(low)
            found.append(product("btr,rgk->btgk", low, self.up[start : start + rank]).astype(dtype))
            start += rank
        return found
