"""Prefix linear attention (JRT-RNN, 2407.05483, section 4.1) as a token mixer.

Linear attention decides at each token what its state keeps, before it knows what will be asked. Here the state begins
with a first look at all of a prompt: keys and values of its own, ke and ve, summed over the prefix of M tokens. Then
tokens are read, the prefix's among them, and each finds what the first look has left beside what came before it:

    y_i = (f(q_i)^T (sum_{j <= M} f(ke_j) ve_j^T + sum_{j <= i} f(k_j) v_j^T)) / (f(q_i)^T (the same without values))

Without a prefix it is linear attention as Based has it (2402.18668). Features f of the paper's kind give the Taylor
polynomial of exp to its second order. A pair of channels is kept once, where the paper's code keeps it twice: a state
has 153 rows in the place of 273 for 16 channels, and the same weights. No token is forgotten, so that sums only grow:
a sum of ones in float32 ends at 2^24 tokens.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.recurrent import recurrence
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import PrefixLinearConfig
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.models.parameters import kernel, product
from streamjax.parallel.rules import constrain

EPS = 1e-12  # of the sum of weights, as in the paper's code: padding in front of a stream's first token has none


class PrefixLinear(RecurrentMixer):
    """Of a group `inside` makes a query, a key and a value, in this order; `first` the key and value of the first look.

    The last column of a state is the sum of features, by which what is read is divided.
    """

    config: PrefixLinearConfig

    def __init__(self, config: PrefixLinearConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        key, key_first = jax.random.split(key)
        super().__init__(config, d_model, config.value_dim, key, dtype, gain, bias=False)
        shape = (d_model, config.num_groups, config.key_dim + config.value_dim)
        self.first = kernel(key_first, shape, ("embed", "kv_heads", "head_dim"), d_model, dtype)

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        assert state.memory is not None
        q, k, v = jnp.split(self.enter(x), (self.config.key_dim, 2 * self.config.key_dim), axis=-1)
        v = _with_one(v)[..., None, :]
        kept = jnp.zeros(v.shape[:-1], v.dtype)  # nothing is forgotten
        read, memory = recurrence(self.features(q), self.features(k), v, kept, state.memory, valid=valid, resets=resets)
        return self.leave(read[..., :-1] / (read[..., -1:] + EPS), x.dtype), RecurrentState(memory)

    def look_ahead(self, x: Float[Array, "B T E"], state: RecurrentState, prefix: Bool[Array, "B T"]) -> RecurrentState:
        assert state.memory is not None
        made = product("bte,egd->btgd", x, self.first[...])
        k, v = jnp.split(constrain(made, "batch", "length", "kv_heads", "head_dim"), (self.config.key_dim,), axis=-1)
        k = jnp.where(prefix[..., None, None], self.features(k), 0.0)
        memory = state.memory + jnp.einsum("btgk,btgv->bgkv", k, _with_one(v)).astype(state.memory.dtype)
        return RecurrentState(jnp.where(jnp.any(prefix, axis=1)[:, None, None, None], memory, state.memory))

    def features(self, x: Float[Array, "*B K"]) -> Float[Array, "*B F"]:
        """Features of queries or keys, in the dtype of sums; all products of two tokens' are above 0."""
        x = x.astype(accumulator(x.dtype))
        if self.config.features == "elu":
            return 1.0 + jax.nn.elu(x)
        x = x * x.shape[-1] ** -0.25
        low, high = np.triu_indices(x.shape[-1])
        pairs = x[..., low] * x[..., high] * np.where(low == high, math.sqrt(0.5), 1.0).astype(x.dtype)
        return jnp.concatenate((jnp.ones_like(x[..., :1]), x, pairs), axis=-1)


def _with_one(v: Float[Array, "*B V"]) -> Float[Array, "*B V1"]:
    """Values in the dtype of sums, and a one behind each."""
    v = v.astype(accumulator(v.dtype))
    return jnp.concatenate((v, jnp.ones_like(v[..., :1])), axis=-1)
