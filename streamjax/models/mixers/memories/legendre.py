"""The Legendre memory unit (Voelker et al., 2019) in its parallel form (2102.11417) as a token mixer.

`u = relu(W_u x + b_u)`, a memory m of each channel of u, `y = relu(W_m m + W_x x + b_y)`. LMUFormer (2402.04882), whose
u is one channel, has one more product behind y; in its spiking variant there are neurons in place of ReLUs, in front of
the unit and behind m. Its batch norms are norms of a token's channels here: a token depends on no other row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from streamjax.attention.legendre_memory import legendre_memory
from streamjax.attention.spiking import leaky_spikes
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import LMUConfig, NormConfig
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.models.norms import Norm
from streamjax.models.parameters import kernel, product

NEURON_NORM = NormConfig("layer", bias=True)  # of what charges neurons
FIRST_THRESHOLD = 0.5  # of the neurons that read the residual stream


class LMU(RecurrentMixer):
    """Of a group `inside` makes what is remembered; `out` reads all numbers of its memories, polynomials outside."""

    config: LMUConfig

    def __init__(self, config: LMUConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        key, key_direct = jax.random.split(key)
        self.spiking, inner = config.unit == "spiking", config.num_groups * config.channels
        if self.spiking and inner != d_model:
            raise ValueError(
                f"LMUConfig has {config.num_groups} parts of {config.channels}: a spiking unit's are together d_model, "
                f"{d_model}"
            )
        super().__init__(config, d_model, config.order * config.channels, key, dtype, gain, bias=True)
        self.direct = kernel(key_direct, (d_model, d_model), ("embed", "activation_embed"), d_model, dtype, gain)
        key_after = jax.random.fold_in(key_direct, 1)
        axes = ("embed", "activation_embed")
        after = kernel(key_after, (d_model, d_model), axes, d_model, dtype, gain)
        self.after = None if config.unit == "plain" else after
        widths = (inner, inner * config.order, d_model) if self.spiking else ()
        self.norms = nnx.List([Norm(width, NEURON_NORM, dtype) for width in widths])

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        assert state.memory is not None
        known: dict[str, Any] = {"valid": valid, "resets": resets}
        if self.spiking:
            return self._recur_with_spikes(x, state.memory, known)
        remembered = jax.nn.relu(self.enter(x))
        memories, last = legendre_memory(remembered, state.memory, theta=self.config.theta, **known)
        y = jax.nn.relu(self._unit(memories, x))
        return y if self.after is None else product("bte,ef->btf", y, self.after[...]), RecurrentState(last)

    def _unit(self, memories: Float[Array, "B T G N D"], x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        heads = rearrange(memories, "b t g n d -> b t g 1 (n d)")
        return self.leave(heads, x.dtype) + product("bte,ef->btf", x, self.direct[...])

    def _recur_with_spikes(
        self, x: Float[Array, "B T E"], state: Float[Array, "B G S D"], known: dict[str, Any]
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        """Weights are multiplied by spikes alone, 0 or 1: their products are sums of some of them."""
        assert self.after is not None
        order, groups, dtype = self.config.order, self.config.num_groups, x.dtype
        old, of_memories, of_input, of_u, of_output = jnp.split(
            state, (order, 2 * order, 2 * order + 1, 2 * order + 2), axis=2
        )
        norm_u, norm_m, norm_y = self.norms

        def spikes(x: Array, norm: Norm | None, potentials: Array, threshold: float = 1.0) -> tuple[Array, Array]:
            """Of [B, T, C], whose channels lie as those of the potentials, [B, G, rows, D]."""
            charge = x if norm is None else norm(x)
            charge = rearrange(charge, "b t (g n d) -> b t g n d", g=groups, d=self.config.channels)
            fired, new = leaky_spikes(charge, potentials, threshold=threshold, **known)
            return fired.astype(dtype), new

        read, of_input = spikes(x, None, of_input, FIRST_THRESHOLD)
        read = rearrange(read, "b t g 1 d -> b t (g d)")
        u, of_u = spikes(rearrange(self.enter(read), "b t g d -> b t (g d)"), norm_u, of_u)
        memories, last = legendre_memory(u[:, :, :, 0], old, theta=self.config.theta, **known)
        told, of_memories = spikes(rearrange(memories, "b t g n d -> b t (g n d)"), norm_m, of_memories)
        y, of_output = spikes(self._unit(told, read), norm_y, of_output)
        y = product("bte,ef->btf", rearrange(y, "b t g 1 d -> b t (g d)"), self.after[...])
        return y, RecurrentState(jnp.concatenate((last, of_memories, of_input, of_u, of_output), axis=2))
