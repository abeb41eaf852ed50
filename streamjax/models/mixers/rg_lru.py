"""Griffin's recurrent block (2402.19427) as a token mixer: the real-gated linear recurrent unit, RG-LRU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.elementwise_recurrence import elementwise_recurrence
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import RGLRUConfig
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.models.mixers.short_conv import ShortConv
from streamjax.models.mlps.dense import ACTIVATIONS
from streamjax.models.parameters import kernel, product, zeros

SHARPNESS = 8.0  # a decay is `exp(-8 * gate * softplus(rate))`
FIRST_DECAYS = (0.9, 0.999)  # between which a channel's decay is at first, where its gate is 1
STEEPEST = 1000.0  # slope of the square root near 0, which has none there


class RGLRU(RecurrentMixer):
    """A short convolution, a recurrence of single channels whose gates see their block alone, and an output gate.

    Of a group `inside` makes what is convolved and what gates the output, in this order. What a token adds is scaled so
    that the state keeps its size; the first token of a stream or document is not. So a state says whether it is empty.
    """

    config: RGLRUConfig

    def __init__(self, config: RGLRUConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        key, key_conv, key_in, key_decay, key_rate = jax.random.split(key, 5)
        super().__init__(config, d_model, config.channels, key, dtype, gain, bias=True)
        groups, width = config.num_groups, config.channels
        self.conv = ShortConv(config.conv_width, groups, width, key_conv, dtype, bias=True)
        block, axes = (groups, width, width), ("kv_heads", "latent", "head_dim")
        self.input_gate = kernel(key_in, block, axes, width, dtype, inputs=())
        self.input_gate_bias = zeros((groups, width), ("kv_heads", "head_dim"), dtype)
        self.decay_gate = kernel(key_decay, block, axes, width, dtype, inputs=())
        self.decay_gate_bias = zeros((groups, width), ("kv_heads", "head_dim"), dtype)
        decay = jax.random.uniform(key_rate, (groups, width), jnp.float32, *FIRST_DECAYS)
        rate = jnp.log(jnp.expm1(-jnp.log(decay) / SHARPNESS))  # the inverse of a softplus
        self.rate = nnx.Param(rate.astype(dtype), axes=("kv_heads", "head_dim"))

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        wide = accumulator(x.dtype)
        assert state.memory is not None
        assert state.conv is not None
        branch, out = jnp.split(self.enter(x), 2, axis=-1)
        branch, conv = self.conv(branch, state.conv, valid, resets)
        gate = jax.nn.sigmoid(self._gate(branch, self.input_gate, self.input_gate_bias))
        decay_gate = jax.nn.sigmoid(self._gate(branch, self.decay_gate, self.decay_gate_bias))
        log_decay = -SHARPNESS * decay_gate * jax.nn.softplus(self.rate[...].astype(wide))
        memory, started = state.memory[:, :, 0, :-1], state.memory[:, :, 0, -1:]
        first = jnp.zeros(x.shape[:2], bool) if resets is None else resets
        first = first.at[:, 0].set(first[:, 0] | (started[:, 0, 0] == 0))
        added = branch.astype(wide) * gate
        added = jnp.where(first[:, :, None, None], added, added * _root(-jnp.expm1(2 * log_decay)))
        heads, memory = elementwise_recurrence(added, log_decay, memory, valid=valid, resets=resets)
        read = jnp.ones(x.shape[:1], bool) if valid is None else jnp.any(valid, axis=1)
        started = jnp.where(read[:, None, None], jnp.ones_like(started), started)
        heads = heads * ACTIVATIONS[self.config.activation](out).astype(wide)
        memory = jnp.concatenate((memory, started), axis=-1)[:, :, None]
        return self.leave(heads[..., None, :], x.dtype), RecurrentState(memory, conv)

    def _gate(self, x: Float[Array, "B T G D"], weight: nnx.Param, bias: nnx.Param) -> Float[Array, "B T G D"]:
        wide = accumulator(x.dtype)
        return product("btgc,gcd->btgd", x, weight[...], wide) + bias[...].astype(wide)


@jax.custom_jvp
def _root(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The square root of numbers at least 0, with a bounded slope."""
    return jnp.sqrt(x)


@_root.defjvp
def _root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = _root(primals[0])
    return root, tangents[0] * jnp.minimum(STEEPEST, 0.5 / jnp.maximum(root, jnp.finfo(root.dtype).tiny))
