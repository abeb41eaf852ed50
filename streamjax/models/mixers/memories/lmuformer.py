"""What LMUFormer (2402.04882) has around its memory units: an embedding by convolutions, and a mixer that spikes.

Its batch norms are norms of a token's channels here (see `legendre.py`), and its convolutions see no token ahead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from streamjax.attention.spiking import leaky_spikes
from streamjax.kv.layer_caches.recurrence import RecurrentState
from streamjax.models.config import ConvEmbeddingConfig, SpikingMixConfig
from streamjax.models.mixers.memories.legendre import FIRST_THRESHOLD, NEURON_NORM
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.models.mixers.short_conv import newest_inputs
from streamjax.models.norms import Norm
from streamjax.models.parameters import kernel, product


class ConvEmbedding(RecurrentMixer):
    """`x + conv(x)` of what convolutions one behind the other make; `convs` are [width * E, E], oldest tap first."""

    config: ConvEmbeddingConfig

    def __init__(self, config: ConvEmbeddingConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        if config.num_groups * config.channels != d_model:
            raise ValueError(
                f"ConvEmbeddingConfig has {config.num_groups} parts of {config.channels}: together they must be "
                f"d_model, {d_model}"
            )
        self.config = config
        rows, axes = config.conv_width * d_model, ("embed", "activation_embed")
        keys = jax.random.split(key, config.depth + 1)
        self.convs = nnx.List([kernel(key, (rows, d_model), axes, rows, dtype) for key in keys])
        self.norms = nnx.List([Norm(d_model, NEURON_NORM, dtype) for _ in range(config.depth)])

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        c, tail = self.config, self.config.conv_width - 1
        before, old = state.conv, state.memory
        assert before is not None
        newest, potentials = [], []

        def convolved(x: Array, at: int) -> Array:
            parts = rearrange(x, "b t (g d) -> b t g d", g=c.num_groups)
            seen, last = newest_inputs(parts, before[:, at * tail : (at + 1) * tail], valid, resets)
            newest.append(last)
            return product("btf,fe->bte", rearrange(seen, "b t w g d -> b t (w g d)"), self.convs[at][...])

        def activated(x: Array, at: int) -> Array:
            if not c.spiking:
                return self.norms[at](jax.nn.relu(x))
            assert old is not None
            charge = rearrange(self.norms[at](x), "b t (g d) -> b t g d", g=c.num_groups)
            fired, last = leaky_spikes(charge, old[:, :, at], valid=valid, resets=resets)
            potentials.append(last)
            return rearrange(fired, "b t g d -> b t (g d)").astype(x.dtype)

        for at in range(c.depth - 1):
            x = activated(convolved(x, at), at)
        x = convolved(x, c.depth - 1)
        last = activated(x, c.depth - 1)
        x = (x if c.spiking else last) + convolved(last, c.depth)
        memory = jnp.stack(potentials, axis=2) if c.spiking else None
        return x, RecurrentState(memory, jnp.concatenate(newest, axis=1))


class SpikingMix(RecurrentMixer):
    """`out(spikes(norm(inside(spikes(x)))))`."""

    config: SpikingMixConfig

    def __init__(self, config: SpikingMixConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        if config.num_groups * config.width != d_model:
            raise ValueError(
                f"SpikingMixConfig has {config.num_groups} parts of {config.width}: together they must be d_model, "
                f"{d_model}"
            )
        super().__init__(config, d_model, config.channels, key, dtype, gain, bias=True)
        self.norm = Norm(config.projected, NEURON_NORM, dtype)

    def recur(
        self,
        x: Float[Array, "B T E"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RecurrentState]:
        c, dtype = self.config, x.dtype
        assert state.memory is not None
        of_input, of_hidden = jnp.split(state.memory[:, :, 0], (c.width,), axis=-1)
        charge = rearrange(x, "b t (g d) -> b t g d", g=c.num_groups)
        read, of_input = leaky_spikes(charge, of_input, threshold=FIRST_THRESHOLD, valid=valid, resets=resets)
        hidden = self.enter(rearrange(read, "b t g d -> b t (g d)").astype(dtype))
        hidden = rearrange(self.norm(rearrange(hidden, "b t g d -> b t (g d)")), "b t (g d) -> b t g d", g=c.num_groups)
        fired, of_hidden = leaky_spikes(hidden, of_hidden, valid=valid, resets=resets)
        memory = jnp.concatenate((of_input, of_hidden), axis=-1)[:, :, None]
        return self.leave(fired[:, :, :, None].astype(dtype), dtype), RecurrentState(memory)
